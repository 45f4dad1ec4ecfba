"""A rollback undoes every bad step, also those that an end forced into a checkpoint."""

import pytest

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
