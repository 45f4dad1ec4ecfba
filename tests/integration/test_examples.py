"""The examples a user runs: the dry runs print every command, the smoke runs carry all of them out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_inherit.train.run_folder import write_exit_status

ROOT = Path(__file__).resolve().parents[2]
INHERITUNE = ("inheritune_llama2_7b_50B.sh", "inheritune_openllama3b_1B.sh")
SWS = "sws_llama2_7b.sh"
GROW = ("grow_gpt2_medium.sh", "grow_gpt2_large.sh")
ON_A_CPU = ("quickstart.sh", "inheritune_smollm2_cpu.sh", "sws_cpu.sh", "study_cpu.sh", "grow_modes_cpu.sh")
DATA = ("data ingest", "data tokenize", "data subset", "data windows")


def run_example(name, *options, **environ):
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    return subprocess.run(["bash", f"examples/{name}", *options], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("told", "code"), [(0, 0), (75, 1), (6, 1), (None, 1)])
def test_only_a_run_that_is_done_is_taken_for_done(tmp_path, told, code):
    folder = tmp_path / "run"
    folder.mkdir()
    if told is not None:
        write_exit_status(folder, code=told, reason="some end")
    words = "source examples/cluster.sh; train_on_cluster"
    env = os.environ | {"WORK": str(tmp_path), "LAUNCH": "done"}
    assert subprocess.run(["bash", "-euc", words], cwd=ROOT, env=env, capture_output=True).returncode == code


@pytest.mark.parametrize(
    ("name", "commands"),
    [(name, ("inherit ", "launch slurm", "export", "evaluate")) for name in INHERITUNE]
    + [(name, (f"grow {name[:-3].replace('_', '-')} ", "export", "evaluate", "report")) for name in GROW]
    + [(SWS, ("share plan", "share init", "launch slurm sws-llama2-7b", "share extract", "share family"))],
)
def test_a_dry_run_prints_every_command_and_writes_nothing(name, commands, tmp_path):
    done = run_example(name, "--dry-run", WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    for command in (*DATA, *commands):
        assert f"$ minherit {command}" in done.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", GROW)
def test_a_submitted_growth_has_cores_for_its_gpus_and_time_to_save(name, tmp_path):
    done = run_example(name, "--dry-run", WORK=str(tmp_path / "work"), LAUNCH="slurm", GPUS_PER_NODE="4")
    (job,) = (line for line in done.stdout.splitlines() if line.startswith("$ sbatch "))
    assert "--gpus-per-node 4 " in job
    assert "--cpus-per-task 32 " in job
    assert "--signal B:USR1@300 " in job


@pytest.mark.parametrize("name", [*INHERITUNE, SWS])
def test_a_missing_teacher_is_said_before_anything_runs(name, tmp_path):
    done = run_example(name, TEACHER=str(tmp_path / "none"), WORK=str(tmp_path / "work"))
    assert done.returncode == 5
    assert "set TEACHER" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", GROW)
def test_a_growth_without_its_text_is_refused(name, tmp_path):
    done = run_example(name, RAW=str(tmp_path / "none"), WORK=str(tmp_path / "work"))
    assert done.returncode == 5
    assert "set RAW" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", [*INHERITUNE, *GROW, SWS])
def test_an_option_that_is_none_is_refused(name, tmp_path):
    done = run_example(name, "--smoky", WORK=str(tmp_path / "work"))
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INHERITUNE, *GROW, SWS, *ON_A_CPU])
def test_help_is_had_from_any_folder_and_a_stray_word_begins_nothing(name):
    def told(word):
        env = {"PATH": "/usr/bin:/bin"}  # neither Python nor minherit is needed, and no set-up begins
        folder = ROOT / "examples"
        return subprocess.run(["bash", name, word], cwd=folder, env=env, capture_output=True, text=True)

    shown = told("--help")
    assert shown.returncode == 0, shown.stderr
    assert f"bash examples/{name}" in shown.stdout
    stray = told("some-word")
    assert stray.returncode == 2
    assert "some-word" in stray.stderr
    assert stray.stdout == ""


@pytest.mark.parametrize("name", INHERITUNE)
def test_a_smoke_run_ends_with_a_student_and_a_page(name, tmp_path):
    done = run_example(name, "--smoke", SMOKE_WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "work" / "student-trained" / "model.safetensors").exists()
    assert "lambada_openai" in (tmp_path / "work" / "report.html").read_text()


@pytest.mark.slow
def test_a_smoke_run_ends_with_a_family(tmp_path):
    done = run_example(SWS, "--smoke", SMOKE_WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    family = json.loads((tmp_path / "work" / "family" / "family.json").read_text())
    assert [row["depth"] for row in family["members"]] == [2, 3]
    for depth in (2, 3):
        assert (tmp_path / "work" / "family" / f"depth-{depth:02d}" / "model.safetensors").exists()
    assert (tmp_path / "work" / "report.html").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("name", GROW)
def test_a_smoke_run_grows_a_student(name, tmp_path):
    done = run_example(name, "--smoke", SMOKE_WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    growth = json.loads((tmp_path / "work" / "growth" / "grow.json").read_text())
    assert growth["rounds"][0]["layers"] == 2
    assert growth["outcome"]["reason"] in ("parity", "all blocks")
    assert json.loads((tmp_path / "work" / "student" / "config.json").read_text())["n_layer"] in (2, 4)
    page, card = (tmp_path / "work" / name for name in ("report.html", "student/README.md"))
    assert "<h2>Growth</h2>" in page.read_text()
    assert re.search(r"<th>round-\d+-n\d+</th><th>teacher</th>", page.read_text()), "both are scored"
    assert "| lambada_openai | acc | 0 | 16 |" in card.read_text()
