"""One recipe on both engines and several layouts: the same curve, exact resume, and a relay across all of them."""

import json
import os
import sys

import pytest

from tests.support import forked_world, tiny_run
from tests.support.sabotage import poison, sabotage
from tests.support.tiny_run import curve, recipe, rows, saved_hashes

pytestmark = pytest.mark.slow

LAYOUTS = {
    "zero0": (2, ("engine=deepspeed", "deepspeed.zero_stage=0")),
    "zero2": (2, ("engine=deepspeed", "deepspeed.zero_stage=2")),
    "zero1": (2, ("engine=deepspeed", "deepspeed.zero_stage=1")),
    "zero3": (2, ("engine=deepspeed", "deepspeed.zero_stage=3")),
    "tp2": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ("megatron.distributed_optimizer=true",)),
    "cp2": (2, ("parallel.cp=2",)),
    "tp2-pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
    "tp2-dp2-zero3": (4, ("engine=deepspeed", "parallel.tp=2", "deepspeed.zero_stage=3")),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    forked_world.preload("megatron_inherit.engines.deepspeed.engine")
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("reference")
    ended = forked_world.run(folder, ["train", recipe(folder, corpus)])
    assert ended.codes == [0], ended.text
    return folder / "run"


def refuse_pickles():
    """Lets a rank fail that unpickles anything that names a class or a function."""

    def refuse(event, details):
        if event == "pickle.find_class":
            raise RuntimeError(f"unpickled {details}")

    sys.addaudithook(refuse)


def equal(run, reference):
    one, other = rows(run), rows(reference)
    assert [row["samples"] for row in one] == [row["samples"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["tokens"], a["lr"]) == (b["tokens"], b["lr"])
    for a, b in zip(rows(run, "eval"), rows(reference, "eval"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert (a["windows"], a["fingerprint"]) == (b["windows"], b["fingerprint"])


@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        "dp2",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in LAYOUTS if name not in ("zero3", "dp2")),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, corpus, reference, name):
    size, words = LAYOUTS[name]
    for folder, stops in (("whole", ()), ("halves", ("train.stop_after=7",))):
        path = recipe(tmp_path / folder, corpus, checkpoint={"asynchronous": folder == "halves"})
        for stop in (*stops, "train.stop_after=null"):
            ended = forked_world.run(tmp_path / folder, ["train", path, *words, stop], size=size, before=refuse_pickles)
            assert ended.codes == [0 if "null" in stop else 75] * size, ended.text
    whole, halves = tmp_path / "whole" / "run", tmp_path / "halves" / "run"
    assert curve(halves) == curve(whole)
    assert saved_hashes(halves, 20) == saved_hashes(whole, 20)
    equal(whole, reference)


@pytest.mark.nightly
def test_a_rank_under_zero_3_reads_its_own_part_of_the_weights_only(tmp_path, corpus):
    def count_reads():
        from megatron_inherit.model import load

        make, rank = load.random_reader, os.environ["RANK"]

        def random_reader(config, seed):
            read = make(config, seed)

            def counted(spec, box):
                values = read(spec, box)
                with (tmp_path / f"read{rank}").open("a") as file:
                    file.write(f"{values.numel()}\n")
                return values

            return counted

        load.random_reader = random_reader

    words = ["train", recipe(tmp_path, corpus), "train.steps=1", "schedule.warmup_steps=0", *LAYOUTS["zero3"][1]]
    ended = forked_world.run(tmp_path, words, size=2, before=count_reads)
    assert ended.codes == [0, 0], ended.text
    parameters = json.loads((tmp_path / "run/environment.json").read_text())["parameters"]
    for rank in range(2):
        read = sum(map(int, (tmp_path / f"read{rank}").read_text().split()))
        assert read == pytest.approx(parameters / 2, rel=0.05)


def test_a_relay_over_engines_and_layouts_is_the_run_of_one_process(tmp_path, corpus, reference):
    path = recipe(tmp_path, corpus)
    legs = [(1, ()), LAYOUTS["zero3"], LAYOUTS["tp2"], LAYOUTS["pp2"], LAYOUTS["zero1"]]
    for number, (size, words) in enumerate(legs):
        stop = "train.stop_after=" + ("null" if number == len(legs) - 1 else "4")
        ended = forked_world.run(tmp_path, ["train", path, *words, stop], size=size)
        assert ended.codes == [0 if "null" in stop else 75] * size, ended.text
    equal(tmp_path / "run", reference)


def test_zero_skips_a_gradient_that_is_not_finite_on_both_ranks(tmp_path, corpus, reference):
    size, words = LAYOUTS["zero1"]
    bad = sabotage(poison(lambda first: first // 8 == 6))
    ended = forked_world.run(tmp_path, ["train", recipe(tmp_path, corpus), *words], size=size, before=bad)
    assert ended.codes == [0, 0], ended.text
    (skip,) = rows(tmp_path / "run", "skip")
    assert (skip["step"], skip["sample_ids"], skip["skipped_steps"]) == (7, [48, 55], 1)
    state = json.loads((tmp_path / "run/checkpoints/step_00000020/state.json").read_text())
    assert state["updates"] == 19
    for a, b in zip(rows(tmp_path / "run")[:6], rows(reference)[:6], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
