"""A start that is refused leaves the folder's run as it was."""

import dataclasses
import os
import re
import shutil

import pytest

from megatron_inherit.config import load
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.train import inputs
from tests.support import forked_world, tiny_run

pytestmark = pytest.mark.slow
TOLD = ("run.yaml", "environment.json", "manifest.json")


def test_a_refused_recipe_does_not_replace_what_the_folder_says_of_its_run(tmp_path):
    forked_world.preload()
    corpus = tiny_run.write_corpus(tmp_path / "corpus")
    words = ["train", tiny_run.recipe(tmp_path, corpus), "train.stop_after=2"]
    assert forked_world.run(tmp_path / "first", words).codes == [75]
    before = [(tmp_path / "run" / name).read_bytes() for name in TOLD]
    for override, code in (("model.shape.num_layers=3", 5), (f"data.path={corpus / 'none'}", 4)):
        ended = forked_world.run(tmp_path / "second", [*words, override])
        assert ended.codes == [code], ended.text
        assert [(tmp_path / "run" / name).read_bytes() for name in TOLD] == before
    ended = forked_world.run(tmp_path / "third", ["train", str(tmp_path / "run/run.yaml"), "train.steps=4"])
    assert "Resuming after step 2" in ended.text


@pytest.mark.parametrize(("stop_after", "words"), [(3, "train.global_batch: .* do not meet"), (12, "longer already")])
def test_another_batch_does_not_end_a_token_budget_early(tmp_path, stop_after, words):
    forked_world.preload()
    budget = {"steps": None, "budget": 20 * 8 * tiny_run.LENGTH}
    path = tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"), train=budget)
    first = forked_world.run(tmp_path / "first", ["train", path, f"train.stop_after={stop_after}"])
    assert first.codes == [75], first.text
    refused = forked_world.run(tmp_path / "second", ["train", path, "train.global_batch=16"])
    assert refused.codes == [3], refused.text
    assert re.search(words, refused.text)
    steps = ["train.global_batch=16", "train.budget=null", f"train.steps={stop_after + 2}"]
    changed = forked_world.run(tmp_path / "third", ["train", path, *steps])
    assert changed.codes == [0], changed.text
    assert tiny_run.rows(tmp_path / "run")[-1]["samples"] == 8 * stop_after + 16 * 2


def test_a_node_with_other_data_or_another_recipe_is_named(tmp_path):
    forked_world.preload()
    path = tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"))
    elsewhere = tiny_run.write_corpus(tmp_path / "elsewhere", seed=5)

    def copied_wrongly():
        if os.environ["RANK"] == "1":
            there = inputs.open_loader
            inputs.open_loader = lambda options: there(dataclasses.replace(options, path=str(elsewhere / "corpus")))

    ended = forked_world.run(tmp_path / "data", ["train", path], size=2, before=copied_wrongly)
    assert ended.codes == [4, 4], ended.text
    assert re.search(
        r"Not all ranks have the same data\. Got: another one at rank 1 on \S+ than at rank 0", ended.texts[0]
    )

    def edited_meanwhile():
        if os.environ["RANK"] == "1":
            before = load.load_recipe
            load.load_recipe = lambda recipe, overrides: before(recipe, [*overrides, "optimizer.lr=4e-3"])

    ended = forked_world.run(tmp_path / "recipe", ["train", path], size=2, before=edited_meanwhile)
    assert ended.codes == [3, 3], ended.text
    assert "the same recipe" in ended.texts[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_dry_run_refuses_what_the_run_would_and_leaves_nothing(tmp_path):
    forked_world.preload()
    words = ["train", tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"))]
    assert forked_world.run(tmp_path / "first", [*words, "train.stop_after=2"]).codes == [75]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    elsewhere = [f"run.output={tmp_path / 'elsewhere'}", f"distill.teacher={tmp_path / 'run'}"]
    for more, code in (
        ([], 0),
        (["parallel.tp=2"], 3),
        (["parallel.tp=2", "--processes", "2"], 0),
        (["--resume", "never"], 2),
        (["train.steps=1"], 3),
        (["run.seed=3"], 5),
        (["model.shape.num_layers=3"], 5),
        (elsewhere, 0),
        ([*elsewhere, f"distill.cache={tmp_path / 'none'}"], 4),
        ([*elsewhere, "eval.tasks={names: [no-such-task]}"], 2),
        (["--processes", "2"], 0),
    ):
        ended = forked_world.run(tmp_path.parent / "dry", [*words, *more, "--dry-run"])
        assert ended.codes == [code], (more, ended.text)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert forked_world.run(tmp_path / "second", [*words, "--processes", "2"]).codes == [2]


def test_other_evaluation_windows_of_one_run_are_told(tmp_path):
    forked_world.preload()
    words = ["train", tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus")), "train.stop_after=2"]
    for name in ("first", "second"):
        ended = forked_world.run(tmp_path / name, words)
        assert "other windows" not in ended.text
    tiny_run.write_corpus(tmp_path / "other", seed=1)
    shutil.copyfile(tmp_path / "other/windows.safetensors", tmp_path / "corpus/windows.safetensors")
    ended = forked_world.run(tmp_path / "third", words)
    assert ended.codes == [75], ended.text
    assert "validation losses up to step 4 and after it cannot be compared" in ended.text


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_budget_of_all_tokens_of_the_data_is_met(tmp_path, epochs):
    forked_world.preload()
    corpus = tiny_run.write_corpus(tmp_path / "corpus", documents=12)
    tokens = IndexedFile(corpus / "corpus").num_tokens
    words = ["train", tiny_run.recipe(tmp_path, corpus), "train.steps=null", f"data.epochs={epochs}"]
    ended = forked_world.run(tmp_path / "all", [*words, f"train.budget={epochs * tokens}"])
    assert ended.codes == [0], ended.text
    last = tiny_run.rows(tmp_path / "run")[-1]
    assert 0 <= last["tokens"] - epochs * tokens < 8 * tiny_run.LENGTH
    more = epochs * tokens + 12 * 8 * tiny_run.LENGTH
    ended = forked_world.run(tmp_path / "more", [*words, f"train.budget={more}", f"run.output={tmp_path / 'more'}"])
    assert ended.codes == [4], ended.text
    assert "too few tokens" in ended.text
