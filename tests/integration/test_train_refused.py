"""A start that is refused leaves the folder's run as it was."""

import re

import pytest

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
