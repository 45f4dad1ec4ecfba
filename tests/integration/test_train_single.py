import dataclasses
import json
import os
import resource
import shutil
import signal
import time

import pytest

from megatron_inherit.arch.presets import preset
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute
from tests.support import forked_world, tiny_run
from tests.support.tiny_run import curve, recipe, rows, saved_hashes, status

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload()
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    ended = train(folder, corpus)
    assert ended.codes == [0], ended.text
    return folder / "run"


def train(folder, corpus, *overrides, fault="", sections=None, **more):
    path = recipe(folder, corpus, **(sections or {}))
    return forked_world.run(folder, ["train", path, *overrides], MI_FAULT=fault, **more)


def same(run, reference):
    assert curve(run) == curve(reference)
    assert saved_hashes(run, 20) == saved_hashes(reference, 20)


def test_a_run_leaves_its_rows_and_files(reference):
    train_rows, evals = rows(reference), rows(reference, "eval")
    assert [row["step"] for row in train_rows] == list(range(1, 21))
    assert [row["step"] for row in evals] == [0, 10, 20]
    assert set(train_rows[0]) == {
        "kind", "step", "tokens", "samples", "loss", "grad_norm", "lr", "tokens_per_s", "mfu", "seconds",
    }  # fmt: skip
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.05
    assert evals[0]["windows"] == 9
    assert train_rows[-1]["lr"] == 3e-4
    assert train_rows[-1]["tokens"] == 20 * 8 * tiny_run.LENGTH
    assert status(reference)["exit_code"] == 0
    for name in ("run.yaml", "environment.json", "manifest.json", "checkpoints/latest"):
        assert (reference / name).is_file()
    assert sorted(p.name for p in (reference / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (10, 15, 20)
    ]
    for path in reference.rglob("*"):
        assert path.suffix in {"", ".json", ".jsonl", ".yaml", ".safetensors", ".lock"}


def test_optimizer_state_goes_to_megatron_with_adams_settings(reference, tmp_path):
    words = ["convert", str(reference), str(tmp_path / "core"), "--format", "torch_dist", "--optimizer", "keep"]
    assert main(words) == 0
    with open_source(tmp_path / "core") as source:
        assert source.details["adam"] == (0.9, 0.95, 1e-8)
        assert source.details["optimizer_step"] == source.details["iteration"] == 20
        with open_source(reference) as run:
            name = "exp_avg_sq:layers.0.attn.q.weight"
            assert source.read(name).data.tobytes() == run.read(name).data.tobytes()


def test_the_same_run_twice_is_the_same_bit_for_bit(tmp_path, corpus, reference):
    assert train(tmp_path, corpus, sections={"checkpoint": {"asynchronous": True}}).codes == [0]
    same(tmp_path / "run", reference)


def test_resuming_twice_is_the_uninterrupted_run(tmp_path, corpus, reference):
    for steps in (7, 6):
        ended = train(tmp_path, corpus, f"train.stop_after={steps}")
        assert ended.codes == [75], ended.text
        assert status(tmp_path / "run")["exit_code"] == 75
    assert train(tmp_path, corpus).codes == [0]
    same(tmp_path / "run", reference)
    again = train(tmp_path, corpus)
    assert again.codes == [0]
    same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("point", "resumes_after"),
    [
        ("before_shard_write:0:15", 10),
        ("mid_shard_write:0:15", 10),
        ("before_manifest:0:15", 10),
        ("before_rename:0:15", 10),
        ("before_latest:0:15", 15),
        ("after_step:0:13", 10),
    ],
)
def test_kill_at_any_point_leaves_the_old_state_or_the_new_one(tmp_path, corpus, reference, point, resumes_after):
    asynchronous = {"checkpoint": {"asynchronous": "latest" in point}}
    assert train(tmp_path, corpus, fault=f"{point}:kill", sections=asynchronous).codes == [-9]
    ended = train(tmp_path, corpus)
    assert ended.codes == [0], ended.text
    assert f"Resuming after step {resumes_after} of 20" in ended.text
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))
    same(tmp_path / "run", reference)


@pytest.fixture
def half_done(tmp_path, corpus):
    """A run that stopped after step 12, with checkpoints of steps 5, 10 and 12."""
    assert train(tmp_path, corpus, "train.stop_after=12").codes == [75]
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("pointer", ["", "garbage \x00", "step_00000099\n", None])
def test_what_is_there_beats_the_pointer(tmp_path, corpus, reference, half_done, pointer):
    (half_done / "latest").unlink()
    if pointer is not None:
        (half_done / "latest").write_text(pointer)
    ended = train(tmp_path, corpus)
    assert ended.codes == [0]
    assert "Resuming after step 12" in ended.text
    assert "WARNING" in ended.text
    same(tmp_path / "run", reference)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_damage_is_named_and_the_older_checkpoint_taken(tmp_path, corpus, reference, half_done):
    flip(half_done / "step_00000012" / "rank_00000.safetensors")
    (half_done / "step_00000010" / "manifest.json").unlink()
    ended = train(tmp_path, corpus)
    assert ended.codes == [0]
    assert "Skipping step_00000012" in ended.text
    assert "in tensor" in ended.text
    assert "Skipping step_00000010" in ended.text
    assert "Resuming after step 5" in ended.text
    same(tmp_path / "run", reference)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(tmp_path, corpus, half_done):
    for folder in half_done.glob("step_*"):
        flip(folder / "rank_00000.safetensors")
    ended = train(tmp_path, corpus)
    assert ended.codes == [5]
    assert "None of the 3 checkpoints" in ended.text
    assert "Traceback" not in ended.text
    assert status(tmp_path / "run")["exit_code"] == 5


def test_a_full_disk_stops_or_is_borne(tmp_path, corpus, reference):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    ended = train(tmp_path / "stop", corpus, before=small_files)
    assert ended.codes == [7], ended.text
    assert "free" in ended.text
    assert status(tmp_path / "stop" / "run")["exit_code"] == 7
    assert not list((tmp_path / "stop" / "run" / "checkpoints").glob("step_*"))
    go_on = {"checkpoint": {"on_disk_full": "continue", "asynchronous": True}}
    ended = train(tmp_path / "go", corpus, fault="mid_shard_write:0:10:full", sections=go_on)
    assert ended.codes == [0], ended.text
    assert "goes on without this checkpoint" in ended.text
    same(tmp_path / "go" / "run", reference)


def test_signals_save_and_end_with_75(tmp_path, corpus, reference):
    twice = "after_step:0:8:term,mid_shard_write:0:8:term,before_manifest:0:8:term"
    ended = train(tmp_path, corpus, fault=twice)
    assert ended.codes == [75], ended.text
    assert (tmp_path / "run" / "checkpoints" / "step_00000008" / "manifest.json").is_file()
    ended = train(tmp_path, corpus, fault="mid_shard_write:0:15:term")
    assert ended.codes == [75]
    ended = train(tmp_path, corpus, fault="after_step:0:18:int")
    assert ended.codes == [130]
    assert status(tmp_path / "run")["exit_code"] == 130
    assert train(tmp_path, corpus).codes == [0]
    same(tmp_path / "run", reference)


def test_an_end_comes_before_an_evaluation_which_the_next_session_makes(tmp_path, corpus, reference):
    ended = train(tmp_path, corpus, fault="step_start:0:10:usr1")
    assert ended.codes == [75], ended.text
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0]
    for _ in range(2):
        assert train(tmp_path, corpus).codes == [0]
        same(tmp_path / "run", reference)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, corpus, half_done):
    other = tiny_run.write_corpus(tmp_path / "other", seed=1)
    for override, words in (
        ("model.shape.num_layers=3", "another model"),
        (f"data.path={other / 'corpus'}", "other data"),
        ("run.seed=9", "another sample order"),
        ("train.sequence_length=16", "another sample order"),
    ):
        ended = train(tmp_path, corpus, override)
        assert ended.codes == [5], ended.text
        assert words in ended.text
        assert "Set run.output" in ended.text


def test_a_second_job_is_refused_and_a_dead_one_is_not(tmp_path, corpus, reference):
    path = recipe(tmp_path, corpus)
    first = forked_world.World(
        tmp_path / "first", 1, forked_world.minherit("train", path), {"MI_FAULT": "step_start:0:3:stop"}
    )
    lock = tmp_path / "run" / "run.lock"
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(rows(tmp_path / "run")) < 2:
        time.sleep(0.05)
    second = forked_world.run(tmp_path / "second", ["train", path])
    assert second.codes == [2], second.text
    assert f"process {first.pids[0]}" in second.text
    assert json.loads(lock.read_text())["pid"] == first.pids[0]
    os.kill(first.pids[0], signal.SIGKILL)
    first.wait()
    third = forked_world.run(tmp_path / "third", ["train", path])
    assert third.codes == [0], third.text
    assert "Taking over the lock" in third.text
    same(tmp_path / "run", reference)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, corpus):
    data = shutil.copytree(corpus, tmp_path / "data")
    tokens, index = ((data / f"corpus.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    for name, cut in (("cut", (tokens[:-100], index)), ("short-index", (tokens, index[: len(index) // 2]))):
        (data / f"{name}.bin").write_bytes(cut[0])
        (data / f"{name}.idx").write_bytes(cut[1])
    huge = {"model": {"preset": "llama-2-70b", "init": "random", "shape": {"vocab_size": 10**9}}}
    cases = [
        (("--resume", "never", "run.output=/sys/minherit"), {}, 7, "cannot be written"),
        ((), huge, 7, "free"),
        ((f"data.path={data / 'cut'}",), {}, 4, "cut.bin"),
        ((f"data.path={data / 'short-index'}",), {}, 4, "short-index.idx"),
        (("train.global_batch=9", "train.micro_batch=2"), {}, 3, "train.global_batch"),
        (("engine=deepspeed", "deepspeed.zero_stage=2", "parallel.pp=2"), {}, 3, "exclude each other"),
        (("model.shape.vocab_size=300",), {}, 4, "vocab"),
        (("data.epochs=1", "train.steps=9000"), {}, 4, "too few tokens"),
        (("eval.windows=nothing",), {}, 4, "evaluation windows"),
        (("model.preset=null", "model.path=/nowhere", "model.shape={}"), {}, 5, "does not exist"),
        (("model.shape.layers=3",), {}, 3, "model.shape.num_layers"),
        (("train.sequence_length=4096",), {}, 3, "train.sequence_length"),
        (("parallel.tp=3",), {}, 3, "tp"),
    ]
    for number, (words, sections, code, text) in enumerate(cases):
        folder = tmp_path / str(number)
        ended = train(folder, corpus, *words, sections=sections)
        assert ended.codes == [code], ended.text
        assert text in ended.text
        assert "Traceback" not in ended.text
        assert not (folder / "run" / "metrics.jsonl").exists()


def test_never_resuming_refuses_a_folder_with_checkpoints(tmp_path, corpus, half_done):
    ended = train(tmp_path, corpus, "--resume", "never")
    assert ended.codes == [2]
    assert "step 12" in ended.text


def random_start(folder, seed):
    plan = plan_fresh(
        dataclasses.replace(preset("llama-tiny"), num_layers=2, hidden_size=32, head_dim=8, ffn_size=64), seed=seed
    )
    execute(plan, folder, record={})
    return folder


def test_a_run_goes_on_from_its_own_start_only(tmp_path, corpus):
    starts = {name: random_start(tmp_path / name, seed) for seed, name in enumerate(("one", "other"))}

    def train(*words):
        path = recipe(tmp_path, corpus, model={"preset": None, "shape": {}, "init": "weights"})
        return forked_world.run(tmp_path, ["train", path, *words])

    assert train(f"model.path={starts['one']}", "train.stop_after=2").codes == [75]
    assert (tmp_path / "run/inherit.json").read_text() == (starts["one"] / "inherit.json").read_text()
    before = (tmp_path / "run/run.yaml").read_text()
    ended = train(f"model.path={starts['other']}")
    assert ended.codes == [3], ended.text
    assert str(starts["one"]) in ended.text
    assert (tmp_path / "run/run.yaml").read_text() == before
    starts["one"].rename(tmp_path / "moved")
    for path in (f"model.path={tmp_path / 'moved'}", "model.preset=llama-tiny"):
        ended = train(path, "model.init=random")
        assert ended.codes == [3], ended.text
        assert "began from a checkpoint" in ended.text
    ended = train(f"model.path={tmp_path / 'moved'}", "train.stop_after=1")
    assert ended.codes == [75], ended.text
    kept = tmp_path / "moved/model.safetensors"
    right = kept.read_bytes()
    kept.write_bytes((starts["other"] / "model.safetensors").read_bytes())
    ended = train(f"model.path={tmp_path / 'moved'}")
    assert ended.codes == [3], ended.text
    assert "other weights" in ended.text
    kept.write_bytes(right)
    ended = train(f"model.path={tmp_path / 'moved'}", "train.steps=4")
    assert ended.codes == [0], ended.text


def test_a_run_that_began_from_another_run_goes_on_when_that_one_has_gone_on(tmp_path, corpus):
    first = ["train", recipe(tmp_path / "of_first", corpus), f"run.output={tmp_path / 'first'}"]
    assert forked_world.run(tmp_path / "a", [*first, "train.steps=2"]).codes == [0]
    second = ["train", recipe(tmp_path, corpus, model={"preset": None, "shape": {}, "init": "weights"})]
    second += [f"model.path={tmp_path / 'first'}", "train.steps=4"]
    assert forked_world.run(tmp_path / "b", [*second, "train.stop_after=1"]).codes == [75]
    assert forked_world.run(tmp_path / "c", [*second, "train.stop_after=1"]).codes == [75]
    assert forked_world.run(tmp_path / "d", [*first, "train.steps=3"]).codes == [0]
    ended = forked_world.run(tmp_path / "e", second)
    assert ended.codes == [0], ended.text
    assert "Resuming after step 2" in ended.text


def test_a_dry_run_opens_the_data(tmp_path, corpus):
    ended = train(tmp_path, corpus, "--dry-run", f"data.path={tmp_path / 'nope'}")
    assert ended.codes == [4], ended.text
    assert not (tmp_path / "run").exists()


def test_samples_that_a_deleted_run_gave_up_are_read(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/skipped_samples.json").write_text("[[0, 8]]")
    ended = train(tmp_path, corpus, "train.steps=2")
    assert ended.codes == [0], ended.text
    first, second = (row["samples"] for row in rows(tmp_path / "run") if row["kind"] == "train")
    assert second == 2 * first
    assert not (tmp_path / "run/skipped_samples.json").exists()


def test_a_profile_is_a_trace_that_names_operations(tmp_path, corpus):
    ended = train(tmp_path, corpus, "--profile", "train.steps=8")
    assert ended.codes == [0], ended.text
    trace = json.loads((tmp_path / "run/profile/rank_00000.json").read_text())
    assert any("aten::mm" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_changed_recipe_is_told_and_a_ramp_is_resumed_exactly(tmp_path, corpus):
    ramp = {"train": {"batch_ramp": {"start": 2, "increment": 2, "samples": 24}}}
    for name, stops in (("whole", ()), ("halves", ("train.stop_after=5",))):
        for stop in (*stops, "train.stop_after=null"):
            ended = train(tmp_path / name, corpus, stop, sections=ramp)
            assert ended.codes == [0 if "null" in stop else 75], ended.text
    assert "Changed since the last session: train.stop_after from 5 to None" in ended.text
    assert curve(tmp_path / "halves" / "run") == curve(tmp_path / "whole" / "run")
    sizes = [row["samples"] for row in rows(tmp_path / "whole" / "run")]
    assert sizes[:9] == [2, 4, 6, 8, 12, 16, 22, 28, 36]
