"""A rollback undoes every bad step, also those that an end forced into a checkpoint."""

import pytest

from megatron_inherit.train import checkpointing
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
