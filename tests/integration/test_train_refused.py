"""A start that is refused leaves the folder's run as it was."""

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
