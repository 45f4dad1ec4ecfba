"""A rollback undoes every bad step, also those that an end forced into a checkpoint."""

import math

import pytest

from megatron_inherit.train import checkpointing, upkeep
from tests.support import forked_world, tiny_run
from tests.support.sabotage import sabotage, spike

pytestmark = pytest.mark.slow


def test_a_checkpoint_between_bad_steps_is_not_rolled_back_to(tmp_path):
    forked_world.preload()
    path = tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"))
    bad = sabotage(spike(lambda first: 72 <= first < 104))
    stopped = forked_world.run(tmp_path / "first", ["train", path, "train.stop_after=11"], before=bad)
    assert stopped.codes == [75], stopped.text
    ended = forked_world.run(tmp_path / "second", ["train", path], before=bad)
    assert ended.codes == [0], ended.text
    (rollback,) = tiny_run.rows(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["sample_ids"]) == (5, 13, [72, 103])
    assert not (tmp_path / "run/checkpoints/step_00000011").exists()


def test_a_save_that_falls_on_a_spike_is_made_after_it(tmp_path):
    forked_world.preload()
    keeping = {"every_steps": 5, "keep_last": 1, "keep_every_steps": 10}
    path = tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"), checkpoint=keeping)
    bad = sabotage(spike(lambda first: first in (72, 80)))  # steps 10 and 11
    ended = forked_world.run(tmp_path / "log", ["train", path, "train.steps=17"], before=bad)
    assert ended.codes == [0], ended.text
    assert [row["step"] for row in tiny_run.rows(tmp_path / "run", "spike")] == [10, 11]
    assert [row["step"] for row in tiny_run.rows(tmp_path / "run", "save")] == [5, 12, 15, 17]
    assert checkpointing.list_steps(tmp_path / "run/checkpoints") == [12, 17]


def test_a_last_evaluation_that_is_no_number_does_not_cost_the_last_checkpoint(tmp_path):
    forked_world.preload()
    path = tiny_run.recipe(tmp_path, tiny_run.write_corpus(tmp_path / "corpus"))

    def overflowing():
        right = upkeep.window_losses

        def wrong(*words, **more):
            losses, counts = right(*words, **more)
            return [math.inf, *losses[1:]], counts

        upkeep.window_losses = wrong

    ended = forked_world.run(tmp_path / "log", ["train", path, "train.steps=2"], before=overflowing)
    assert ended.codes == [0], ended.text
    assert "not all finite" in ended.text
    assert checkpointing.list_steps(tmp_path / "run/checkpoints") == [2]


def test_a_checkpoint_before_a_split_brings_its_stages_back(tmp_path):
    forked_world.preload()
    shared = {"plan": "2,2", "untie": [{"plan": "unshared:4", "step": 4}]}
    corpus = tiny_run.write_corpus(tmp_path / "corpus")
    small = {"shape": {"num_layers": 4, "hidden_size": 32, "head_dim": 8, "ffn_size": 64}}
    keeping = {"every_steps": 2, "keep_last": 9}

    def train(name, *words, steps):
        path = tiny_run.recipe(tmp_path / name, corpus, model=small, sharing=shared, checkpoint=keeping)
        ended = forked_world.run(tmp_path / name / "log", ["train", path, f"train.steps={steps}", *words])
        assert ended.codes in ([0], [75]), ended.text
        return tmp_path / name / "run"

    whole = train("whole", steps=8)
    cut = train("cut", "train.stop_after=6", steps=8)
    for step in (4, 6):
        (checkpointing.step_folder(cut / "checkpoints", step) / "rank_00000.safetensors").write_bytes(b"cut")
    train("cut", steps=8)
    assert [row["step"] for row in tiny_run.rows(cut, "untie")] == [4]
    assert tiny_run.curve(cut) == tiny_run.curve(whole)
    assert tiny_run.saved_hashes(cut, 8) == tiny_run.saved_hashes(whole, 8)
