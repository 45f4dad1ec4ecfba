"""SWS from the command line: init, train towards a teacher, split, resume, cache, extract, expand, family."""

import dataclasses
import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_inherit.arch.counts import flops_per_token
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from megatron_inherit.data.windows import EvalWindows
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute
from megatron_inherit.sharing.learngene import plan_of
from megatron_inherit.sharing.stage_plan import parse_plan
from megatron_inherit.sharing.tensors import count_shared
from tests.support.sharing_world import tiny
from tests.support.text_data import random_documents, write_tokens

pytestmark = pytest.mark.slow

RECIPE = """
run: {{name: aux, output: {out}, seed: 1}}
model: {{path: {gene}, init: weights}}
data: {{path: {data}, split: all, epochs: 0}}
train: {{steps: 6, global_batch: 4, micro_batch: 2, sequence_length: 16, dtype: fp32}}
optimizer: {{lr: 1.0e-2}}
schedule: {{kind: constant}}
engine: megatron
distill: {{teacher: {teacher}}}
checkpoint: {{every_steps: 100, keep_last: 9, asynchronous: false}}
eval: {{windows: {windows}, every_steps: 2}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sws")
    write_tokens(folder / "tokens", random_documents(200, vocab_size=128), vocab_size=128)
    ids = np.random.default_rng(0).integers(0, 128, (8, 17))
    EvalWindows(ids, 8 * 16).save(folder / "windows.safetensors")
    execute(plan_fresh(tiny(6), seed=2, std=0.3), folder / "teacher")
    execute(plan_fresh(tiny(6), seed=3, std=0.3), folder / "retrained")
    for name, change in (("short", {"max_positions": 8}), ("odd", {"num_heads": 3, "num_kv_heads": 3})):
        execute(plan_fresh(dataclasses.replace(tiny(2), **change), seed=4), folder / name)
    assert main(["share", "init", str(folder / "teacher"), str(folder / "gene"), "--plan", "4,4"]) == 0
    return folder


def recipe(work, name, **changes):
    path = work / f"{name}.yaml"
    values = {
        "out": work / name,
        "gene": work / "gene",
        "data": work / "tokens",
        "teacher": work / "teacher",
        "windows": work / "windows.safetensors",
    }
    path.write_text(RECIPE.format(**(values | changes)))
    return str(path)


def rows(work, name, kind="train"):
    lines = (work / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(work, name):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(work, name)]


UNTIE = ["sharing.untie=[{plan: '2,2,2,2', step: 2}, {plan: 'unshared:8', patience: 1}]"]


@pytest.fixture(scope="module")
def trained(work):
    assert main(["train", recipe(work, "plain")]) == 0
    return work / "plain"


def test_a_split_run_resumes_exactly(work, trained):
    assert main(["train", recipe(work, "split"), *UNTIE]) == 0
    assert next(row["step"] for row in rows(work, "split", "untie")) == 2
    assert losses(work, "split")[:3] == [
        (step, pytest.approx(loss, abs=1e-6), norm) for step, loss, norm in losses(work, "plain")[:2]
    ] + [(3, pytest.approx(losses(work, "plain")[2][1], abs=1e-6), losses(work, "split")[2][2])]
    assert losses(work, "split")[5][1] != losses(work, "plain")[5][1]
    for stop in (1, 2):
        assert main(["train", recipe(work, "parts"), *UNTIE, f"train.stop_after={stop}"]) == 75
    assert main(["train", recipe(work, "parts"), *UNTIE]) == 0
    assert losses(work, "parts") == losses(work, "split")
    with open_source(work / "split" / "checkpoints" / "step_00000006") as source:
        assert plan_of(source).num_stages in (4, 8)


def test_a_crash_between_saving_and_splitting_changes_nothing(work, trained, monkeypatch):
    assert main(["train", recipe(work, "unbroken"), *UNTIE]) == 0
    monkeypatch.setenv("MI_FAULT", "before_latest:0:2:raise")
    assert main(["train", recipe(work, "broken"), *UNTIE]) == 1
    assert (work / "broken/checkpoints/step_00000002").is_dir()
    assert rows(work, "broken", "untie") == []
    monkeypatch.delenv("MI_FAULT")
    assert main(["train", recipe(work, "broken"), *UNTIE]) == 0
    assert losses(work, "broken") == losses(work, "unbroken")
    assert [row["plan"] for row in rows(work, "broken", "untie")] == [
        row["plan"] for row in rows(work, "unbroken", "untie")
    ]


def test_parameters_are_counted_once_and_operations_by_depth(work, trained):
    config, plan = tiny(8), parse_plan("4,4")
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["parameters"] == count_shared(config, plan).unique
    assert environment["num_layers"] == 8
    assert rows(work, "plain", "run")[0]["flops_per_token"] == flops_per_token(config, 16, "palm")


def test_another_plan_does_not_go_on(work, capsys):
    execute(plan_fresh(tiny(8), seed=5), work / "ordinary")
    run = ["train", recipe(work, "replanned", gene=work / "ordinary"), "train.steps=2"]
    assert main([*run, "sharing.plan=4,4"]) == 0
    assert main([*run, "sharing.plan=8", "train.steps=4"]) == 5
    assert "another stage plan" in capsys.readouterr().err


def test_a_learngene_comes_out_and_grows(work, trained, capsys):
    gene = work / "trained-gene"
    assert main(["share", "extract", str(trained), str(gene)]) == 0
    names = (work / "trained-gene" / "learngene.safetensors").read_bytes()[:6000]
    assert b"sws.stages.1.attn.q.weight" in names
    assert b"layers." not in names
    capsys.readouterr()
    windows = str(work / "windows.safetensors")
    assert (
        main(["share", "expand", str(gene), str(work / "six"), "--depth", "5", "--place", "auto", "--windows", windows])
        == 0
    )
    assert "nats" in capsys.readouterr().out
    with open_source(work / "six") as made, open_source(gene) as source:
        assert made.format == "hf"
        assert made.config == source.config.with_layers(5)
    assert main(["share", "family", str(gene), str(work / "family"), "--depths", "2,4,8", "--windows", windows]) == 0
    found = json.loads((work / "family" / "family.json").read_text())
    assert [row["depth"] for row in found["members"]] == [2, 4, 8]
    assert found["members"][2]["loss"] == pytest.approx(rows(work, "plain", "eval")[-1]["loss"], abs=1e-5)
    assert "parameters stored separately" in found["saving"]


def test_cached_targets_teach_as_the_teacher_does(work, trained, capsys):
    cached = recipe(work, "cached")
    assert main(["share", "cache", cached, str(work / "cache"), "--entries", "128", "--shard-samples", "7"]) == 0
    assert main(["train", cached, f"distill.cache={work / 'cache'}"]) == 0
    for (_, loss, norm), (_, other, wanted) in zip(losses(work, "cached"), losses(work, "plain"), strict=True):
        assert loss == pytest.approx(other, abs=2e-3)
        assert norm == pytest.approx(wanted, rel=2e-2)
    capsys.readouterr()
    for change, word in (
        ("distill.temperature=2.0", "temperature"),
        ("run.seed=9", "data"),
        (f"distill.teacher={work / 'gene'}", "teacher"),
        (f"distill.teacher={work / 'retrained'}", "teacher"),
    ):
        assert main(["train", recipe(work, "other"), f"distill.cache={work / 'cache'}", change]) == 4
        assert f"belong to another {word}" in capsys.readouterr().err
    assert main(["train", recipe(work, "other"), f"distill.cache={work / 'cache'}", "train.steps=9"]) == 4
    assert "end at sample 24" in capsys.readouterr().err
    assert not (work / "other" / "metrics.jsonl").exists() or not rows(work, "other"), "before the first step"


def test_a_cache_is_the_same_whatever_pipeline_trains_with_it_and_whoever_makes_it(work, trained, capsys, monkeypatch):
    piped = recipe(work, "piped")
    words = ["--entries", "2", "--samples", "5", "--shard-samples", "5"]
    assert main(["share", "cache", piped, str(work / "alone"), *words]) == 0
    assert main(["share", "cache", piped, str(work / "many"), "parallel.pp=2", "parallel.tp=2", *words]) == 0
    files = [(work / name / "targets-000000.safetensors").read_bytes() for name in ("alone", "many")]
    assert files[0] == files[1]
    capsys.readouterr()
    words[-1] = "2"
    for share in ("1/2", "0/2"):
        assert main(["share", "cache", piped, str(work / "joined"), *words, "--share", share]) == 0
    assert "share 0/2 is finished" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.delattr("megatron_inherit.distill.teacher.build_single")  # whoever joins builds no teacher
        assert main(["share", "cache", piped, str(work / "joined"), *words]) == 0
    assert main(["share", "cache", piped, str(work / "whole"), *words]) == 0
    for path in (work / "whole").iterdir():
        assert (work / "joined" / path.name).read_bytes() == path.read_bytes(), path.name
    capsys.readouterr()
    assert main(["share", "cache", piped, str(work / "long"), "data.epochs=1", "--samples", "99999"]) == 4
    assert "samples" in capsys.readouterr().err


def test_drawn_targets_teach_as_the_teacher_does_on_average(work, trained):
    """128 draws a token have the whole distribution's gradient, but for noise; they do not depend on the shards."""
    drawn = recipe(work, "drawn")
    for folder, shard in (("drawn-cache", "7"), ("drawn-again", "24")):
        words = ["share", "cache", drawn, str(work / folder), "--method", "draw", "--entries", "128"]
        assert main([*words, "--shard-samples", shard]) == 0
    ids = [load_file(work / name / "targets-000000.safetensors")["ids"][:7] for name in ("drawn-cache", "drawn-again")]
    assert np.array_equal(*ids)
    assert main(["train", drawn, f"distill.cache={work / 'drawn-cache'}"]) == 0
    assert losses(work, "drawn")[0][2] == pytest.approx(losses(work, "plain")[0][2], rel=0.03)
    assert losses(work, "drawn")[0][1] > losses(work, "plain")[0][1]
    assert len(losses(work, "drawn")) == 6


def descendant(work, name, gene, *options):
    assert main(["share", "expand", str(gene), str(work / name), "--depth", "4", "--place", "even", *options]) == 0
    return work / name


def matrices(folder, inside):
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    with open_source(folder / "checkpoints" / latest) as source:
        return [source.read(f"layers.{layer}.{inside}").array() for layer in range(source.config.num_layers)]


def test_descendants_keep_a_pruned_learngenes_zeros(work, trained):
    assert main(["share", "extract", str(trained), str(work / "sparse-gene"), "--compress", "2:4"]) == 0
    start = descendant(work, "sparse-start", work / "sparse-gene")
    run = ["train", recipe(work, "sparse", gene=start), "distill.teacher=null", "sharing.keep_zeros=true"]
    assert main(run) == 0
    assert main(["train", recipe(work, "dense", gene=start), "distill.teacher=null"]) == 0
    for kept, grown in zip(
        matrices(work / "sparse", "mlp.up.weight"), matrices(work / "dense", "mlp.up.weight"), strict=True
    ):
        assert (kept == 0).mean() == pytest.approx(0.5, abs=0.01)
        assert (grown == 0).mean() < 0.01


def test_a_pull_keeps_the_layers_of_a_stage_together(work, trained):
    start = descendant(work, "tied-start", trained)
    spread = {}
    for weight in ("0.0001", "3.0"):
        name = f"pulled-{weight}"
        pull = f"sharing.soft_tie={{plan: '2,2', weight: {weight}}}"
        assert main(["train", recipe(work, name, gene=start), "distill.teacher=null", pull]) == 0
        first, second, *_ = matrices(work / name, "mlp.up.weight")
        spread[weight] = np.abs(first - second).mean()
    assert spread["3.0"] < 0.5 * spread["0.0001"]


def stored(folder):
    """Counts the weights in a run's newest checkpoint."""
    with open_source(folder) as source:
        own = [tensor.shape for name, tensor in source.own.items() if name.startswith("sws.layers.")]
        return count_shared(source.config, plan_of(source)).unique + sum(math.prod(shape) for shape in own)


@pytest.mark.parametrize("option", ["sharing.gates=true", "sharing.low_rank=3"])
def test_what_layers_have_of_their_own_is_kept_and_folded(work, trained, option, capsys):
    name = option.replace("=", "-")
    whole, parts = f"{name}-whole", f"{name}-parts"
    assert main(["train", recipe(work, whole), option, "optimizer.lr=0.05"]) == 0
    assert losses(work, whole)[5][1] != losses(work, "plain")[5][1]
    assert json.loads((work / whole / "environment.json").read_text())["parameters"] == stored(work / whole)
    assert main(["train", recipe(work, parts), option, "optimizer.lr=0.05", "train.stop_after=3"]) == 75
    assert main(["train", recipe(work, parts), option, "optimizer.lr=0.05"]) == 0
    assert losses(work, parts) == losses(work, whole)
    assert main(["share", "extract", str(work / whole), str(work / "no-gene")]) == 3
    windows = str(work / "windows.safetensors")
    assert (
        main(
            ["share", "family", str(work / whole), str(work / f"{name}-family"), "--depths", "8", "--windows", windows]
        )
        == 0
    )
    found = json.loads((work / f"{name}-family" / "family.json").read_text())
    assert found["members"][0]["loss"] == pytest.approx(rows(work, whole, "eval")[-1]["loss"], abs=1e-4)


REFUSED = {
    "sharing.plan=4,3": (3, "does not cover"),
    "sharing.plan=8": (3, "merges stages of model.path"),
    "sharing.plan=3,5": (3, "stages:4,4, or a split of it"),
    "parallel.pp=3": (3, "several pipeline ranks"),
    "parallel.pp=2 and parallel.vpp=2": (3, "several chunks"),
    "sharing.untie=[{plan: '5,3', step: 2}]": (3, "not a split"),
    "sharing.untie=[{plan: '2,2,4', step: 2}, {plan: '4,2,2', step: 4}]": (3, "stages:4,2,2 after stages:2,2,4"),
    "sharing.untie=[{plan: '2,2,2,2'}]": (3, "exactly one of step and patience"),
    "sharing.low_rank=2 and parallel.tp=2": (3, "parallel.tp"),
    "sharing.low_rank=33": (3, "sharing.low_rank"),
    "sharing.gates=true and engine=deepspeed and deepspeed.zero_stage=3": (3, "deepspeed.zero_stage"),
    "engine=deepspeed and deepspeed.zero_stage=2 and parallel.pp=2": (3, "exclude each other"),
    "distill.alpha_steps=5": (3, "distill.alpha_end"),
    "distill.alpha_end=0.5": (3, "distill.alpha_steps"),
    "distill.temperature=0": (3, "distill.temperature"),
    "distill.cache=nothing and distill.kind=jsd": (3, "forward KL"),
    "distill.cache=nothing": (4, "minherit share cache"),
    "distill.teacher={work}/nowhere": (5, "nowhere"),
    "distill.teacher={work}/short": (3, "longer than the teacher's positions"),
    "distill.teacher={work}/odd and parallel.tp=2": (3, "does not divide the teacher's heads"),
    "sharing.keep_zeros=true": (3, "no weight of the blocks is zero"),
    "sharing.keep_zeros=true and engine=deepspeed and deepspeed.zero_stage=1": (3, "no weight of the blocks is zero"),
    "model.path={work}/teacher and sharing.gates=true": (3, "sharing.gates: the model shares no stages"),
    "model.path={work}/teacher and sharing.low_rank=2": (3, "sharing.low_rank: the model shares no stages"),
    "model.path={work}/teacher and sharing.allow_cross_rank=true": (3, "sharing.allow_cross_rank"),
    "model.path={work}/teacher and sharing.untie=[{plan: '2,4', step: 2}]": (3, "sharing.untie: the model shares no"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_step(work, words, capsys, monkeypatch):
    code, message = REFUSED[words]
    split = [word.replace("{work}", str(work)) for word in words.split(" and ")]
    ranks = [int(word.split("=")[1]) for word in split if word.startswith(("parallel.pp", "parallel.tp"))]
    dry = ["--dry-run"] if ranks else []
    monkeypatch.setenv("WORLD_SIZE", str(ranks[0] if ranks else 1))
    capsys.readouterr()
    assert main(["train", recipe(work, "refused"), *split, *dry]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (work / "refused" / "metrics.jsonl").exists() or not rows(work, "refused")
