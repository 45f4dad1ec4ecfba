"""Attention reset in a model: documents packed into one window are each seen as if they were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.engines.batches import model_inputs
from megatron_inherit.model.build import build_single
from megatron_inherit.model.language_model import IGNORED
from tests.support.checkpoints import gpt2, llama
from tests.support.text_data import write_tokens

SEQUENCE = 16
LENGTHS = (5, 9, 1, 7, 12, 3, 11)


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["rotary", "learned"])
def test_packed_documents_are_seen_as_if_each_were_alone(tmp_path: Path, config: ModelConfig) -> None:
    rng = np.random.default_rng(0)
    prefix = write_tokens(tmp_path / "data", [rng.integers(0, config.vocab_size, length) for length in LENGTHS])
    model = build_single(config).eval()
    torch.manual_seed(0)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)

    def losses(boundary: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        options = LoaderOptions(str(prefix), SEQUENCE, split="all", boundary=boundary, shuffle=False)  # type: ignore[arg-type]
        inputs = model_inputs(open_loader(options).batch(0, 2), torch.device("cpu"))
        with torch.no_grad():
            return inputs, model(**inputs, reduction="none")

    inputs, found = losses("reset")
    parts = 0
    for row, segments in enumerate(inputs["segment_ids"]):
        for number in segments.unique():
            mine = segments == number
            tokens, labels = (inputs[name][row : row + 1, mine] for name in ("tokens", "labels"))
            with torch.no_grad():
                alone = model(tokens, labels=labels, reduction="none")
            torch.testing.assert_close(found[row : row + 1, mine], alone, atol=1e-5, rtol=1e-5)
            parts += 1
    assert parts >= 6
    counted = inputs["labels"] != IGNORED
    _, packed = losses("packed")
    assert (packed - found)[counted].abs().max() > 0.01, "across documents the model sees something else"
