"""The golden losses are those of transformers and torch.optim.AdamW today."""

import pytest

from tests.support.engine_world import MODELS
from tests.support.plain_loop import STEPS, fresh_folder, golden, plain_loop


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_loop_gives_the_golden_losses(name, tmp_path):
    pytest.importorskip("transformers")
    history = plain_loop(MODELS[name], fresh_folder(tmp_path / name, MODELS[name]))
    assert len(history) == STEPS == 20
    for found, kept in zip(history, golden(name), strict=True):
        assert found == pytest.approx(kept, abs=1e-5)
