"""The benchmark scripts go their whole way at toy size on any machine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run(*words):
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before, "a toy wrote rows"
    return done


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what it needs")
@pytest.mark.parametrize(
    "words", [("benchmarks/kernels.py",), ("benchmarks/train.py", "gpu"), ("benchmarks/sws_gpu.py",)], ids=str
)
def test_a_script_for_a_gpu_says_what_it_needs(words):
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert "one CUDA GPU" in done.stdout


@pytest.mark.nightly
def test_every_kernel_and_rival_is_measured_at_toy_size():
    done = run("benchmarks/kernels.py", "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("rms_norm", "add_rms_norm", "add_layer_norm", "rope_qkv", "swiglu", "bias_gelu", "linear_kl"):
        assert f"{name} " in done.stdout


@pytest.mark.parametrize(("measured", "code"), [(["ours", "eager"], 0), (["eager"], 1)])
def test_a_kernel_of_ours_that_was_not_measured_is_no_success(monkeypatch, capsys, measured, code):
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "benchmarks" / "kernels.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "CUDA", True)
    monkeypatch.setattr(script, "write", lambda rows: None)
    monkeypatch.setattr(script, "operations_of", lambda *_, **__: [SimpleNamespace(name="swiglu")])
    monkeypatch.setattr(script, "measure", lambda operation: ({"implementation": name} for name in measured))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--shapes", "7b"])
    assert script.main() == code
    assert ("Ours was not measured: swiglu." in capsys.readouterr().out) == bool(code)


@pytest.mark.slow
def test_sharing_and_divergence_are_measured_at_toy_size():
    done = run("benchmarks/sws_gpu.py", "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["arm"]: row for row in map(json.loads, done.stdout.splitlines()[:4])}
    assert rows["fused"]["loss"] == pytest.approx(rows["whole logits"]["loss"], rel=1e-4)
    assert rows["fused"]["gradient_norm"] == pytest.approx(rows["whole logits"]["gradient_norm"], rel=1e-3)
    assert rows["shared"]["expected_saving_bytes"] == 3 * 18 * rows["unshared"]["layer_parameters"]


@pytest.mark.nightly
def test_every_arm_of_the_training_benchmark_runs_at_toy_size():
    pytest.importorskip("deepspeed")
    sizes = ["--steps", "2", "--batch", "4", "--micro-batch", "2", "--length", "64"]
    done = run("benchmarks/train.py", "gpu", "--toy", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    for arm in ("megatron", "deepspeed", "trainer"):
        assert f'"arm": "{arm}"' in done.stdout
    for column in ("mfu_palm", "mfu_causal", "share_matmul", "share_attention", "share_loss", "share_idle"):
        assert done.stdout.count(f'"{column}"') == 3


def test_a_table_of_tasks_takes_scores_without_an_error_and_models_without_a_score(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import arms

    def row(task, metric, value, stderr):
        return {"task": task, "metric": metric, "shots": 0, "items": 9, "value": value, "stderr": stderr}

    files = []
    for name, rows in {
        "teacher": [row("wikitext", "word_perplexity", 31.93, None), row("piqa", "acc", 0.66, 0.05)],
        "student": [row("wikitext", "word_perplexity", 33.67, None)],
    }.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"checkpoint": f"models/{name}", "rows": rows}))
    found = arms.task_rows([], files)
    shown = capsys.readouterr().out
    assert "| wikitext | word_perplexity | 31.93 | 33.67 |" in shown
    assert "| piqa | acc | 0.66 ± 0.05 |  |" in shown
    assert [(line["model"], line["stderr"]) for line in found] == [
        ("teacher", None),
        ("student", None),
        ("teacher", 0.05),
    ]
