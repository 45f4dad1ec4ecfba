"""How much each block matters, by three measures, and which blocks a measure would keep.

Block influence (ShortGPT, Men et al. 2024): 1 - mean cosine of a block's input and output, over all tokens.
Angular distance (Gromov et al. 2024): d(l, l+n) = arccos(cos(h_l, h_{l+n})) / pi at each sequence's last token, mean
over sequences. Perplexity of removal (Kim et al. 2024, Shortened LLaMA): the loss of the model without the block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.attention_rank import measure_attention
from megatron_inherit.eval.blocks import watch_blocks, without_block
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.hf_folder import as_hf_folder, default_device, load_model, load_tokenizer
from megatron_inherit.inherit.select import parse_auto, parse_layers

if TYPE_CHECKING:
    import torch

METRICS = ("attention-rank", "block-influence", "angular", "ppl")


@dataclass(frozen=True)
class Importance:
    """What was measured.

    Attributes:
        block_influence: [blocks].
        angular: [span - 1][first block], NaN beyond the model.
        loss: Of the whole model on the same windows, nats a token; None where removal was not measured.
        removal_loss: [blocks], the loss without each, or None.
    """

    checkpoint: str
    sequences: int
    tokens: int
    block_influence: list[float]
    angular: list[list[float]]
    loss: float | None = None
    removal_loss: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Gives plain values; spans that do not exist are null."""
        spans = [[None if math.isnan(value) else value for value in row] for row in self.angular]
        value: dict[str, Any] = {
            "kind": "importance",
            "checkpoint": self.checkpoint,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "block_influence": self.block_influence,
            "angular": spans,
        }
        return value if self.removal_loss is None else value | {"loss": self.loss, "removal_loss": self.removal_loss}


def measure_importance(
    checkpoint: Path | str,
    *,
    text: Path | str | None = None,
    sequences: int = 16,
    tokens: int = 256,
    removal: bool = False,
    device: str = "cpu",
) -> Importance:
    """Measures every block; hidden states of one sequence are in memory at a time.

    Args:
        checkpoint: Of any format, or a run folder.
        text: Where the sequences come from; see ``calibration.sample_windows``.
        sequences: Number of sequences.
        tokens: Length of each; fewer where the model takes fewer.
        removal: Also measures the loss without each block: a pass over all sequences a block.
        device: ``cpu`` or ``cuda``.
    """
    with as_hf_folder(checkpoint) as folder:
        model = load_model(folder, device=device)
        tokens = min(tokens, model.config.max_position_embeddings)
        windows = sample_windows(load_tokenizer(folder), text, sequences=sequences, tokens=tokens)
    influence, angular = _directions(model, windows.to(device))
    if not removal:
        return Importance(str(checkpoint), sequences, tokens, influence, angular)
    loss = mean_loss(model, windows.to(device))
    losses = []
    for block in range(len(influence)):
        with without_block(model, block):
            losses.append(mean_loss(model, windows.to(device)))
    return Importance(str(checkpoint), sequences, tokens, influence, angular, loss, losses)


def mean_loss(model: Any, windows: torch.Tensor) -> float:
    """Gives the mean next-token loss in nats over windows [sequences, tokens], one at a time."""
    import torch

    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def _directions(model: Any, windows: torch.Tensor) -> tuple[list[float], list[list[float]]]:
    import torch

    depth = model.config.num_hidden_layers
    influence = torch.zeros(depth, dtype=torch.float64)
    angular = torch.zeros(depth, depth, dtype=torch.float64)
    ends: list[torch.Tensor] = []

    def see(block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        first, second = before.double(), after.double()
        influence[block] += float((1 - torch.cosine_similarity(first, second, dim=-1)).mean())
        ends.extend([first[0, -1]] if block == 0 else [])
        ends.append(second[0, -1])

    with torch.no_grad(), watch_blocks(model, see):
        for window in windows:
            ends.clear()
            model(window[None], use_cache=False, logits_to_keep=1)
            stack = torch.nn.functional.normalize(torch.stack(ends), dim=-1)
            angles = torch.arccos((stack @ stack.T).clamp(-1, 1)).cpu() / math.pi
            for span in range(1, depth + 1):
                angular[span - 1, : depth + 1 - span] += angles.diagonal(span)
    angular /= len(windows)
    for span in range(1, depth + 1):
        angular[span - 1, depth + 1 - span :] = math.nan
    return (influence / len(windows)).tolist(), angular.tolist()


def select_layers(metric: str, n: int, scores: Mapping[str, Any]) -> tuple[int, ...]:
    """Chooses the blocks that a measure would keep, in their order.

    ``attention-rank`` takes the run of n blocks with the largest mean MaxRank (the earliest of equals), as the
    paper's algorithm asks for contiguous blocks. ``block-influence`` keeps the n largest. ``angular`` drops the span of
    the least distance. ``ppl`` drops the blocks whose removal costs least.

    Args:
        metric: One of ``METRICS``.
        n: Blocks to keep.
        scores: ``to_json()`` of the measurement.

    Raises:
        UsageError: The metric is unknown or was not measured, or n does not fit.
    """
    key = {"attention-rank": "max_rank", "block-influence": "block_influence", "ppl": "removal_loss"}.get(
        metric, metric
    )
    if metric not in METRICS:
        raise UsageError(f"There is no measure {metric!r} of blocks.", expected=f"one of {', '.join(METRICS)}")
    if scores.get(key) is None:
        raise UsageError(f"These scores hold no {metric}.", fix="Measure it first with 'minherit analyze'.")
    values: Sequence[Any] = scores[key]
    depth = len(values)
    if not 1 <= n <= depth:
        raise UsageError(f"{n} blocks cannot be chosen.", expected=f"1 to {depth}")
    if metric == "attention-rank":
        start = max(range(depth - n + 1), key=lambda first: (sum(values[first : first + n]), -first))
        return tuple(range(start, start + n))
    if metric == "angular":
        dropped = depth - n
        if dropped == 0:
            return tuple(range(depth))
        spans = values[dropped - 1][: n + 1]
        start = min(range(n + 1), key=lambda first: spans[first])
        return (*range(start), *range(start + dropped, depth))
    ranked = sorted(range(depth), key=lambda block: (-values[block], block))
    return tuple(sorted(ranked[:n]))


def choose_layers(
    teacher: Path | str, metric: str, n: int, *, text: Path | str | None = None, device: str = "cpu"
) -> tuple[int, ...]:
    """Measures a teacher and chooses: what ``--layers auto:METRIC:N`` does.

    Args:
        teacher: A checkpoint of any format.
        metric: One of ``METRICS``.
        n: Blocks to keep.
        text: Text to measure on; see ``calibration.sample_windows``.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: The metric is unknown or n does not fit.
    """
    if metric not in METRICS:
        raise UsageError(f"There is no measure {metric!r} of blocks.", expected=f"one of {', '.join(METRICS)}")
    if metric == "attention-rank":
        return select_layers(metric, n, measure_attention(teacher, text=text, device=device).to_json())
    removal = metric == "ppl"
    sizes = {"sequences": 8, "tokens": 128} if removal else {"sequences": 16, "tokens": 256}
    return select_layers(
        metric, n, measure_importance(teacher, text=text, removal=removal, device=device, **sizes).to_json()
    )


def resolve_layers(text: str, teacher: Path | str, num_layers: int) -> tuple[int, ...]:
    """Reads the words of ``--layers``; ``auto:METRIC:N`` measures the teacher.

    Args:
        text: As ``inherit.select.parse_layers`` takes it, or ``auto:METRIC:N``.
        teacher: A checkpoint of any format.
        num_layers: Its blocks.

    Raises:
        UsageError: The choice is not understood.
    """
    if not text.startswith("auto:"):
        return parse_layers(text, num_layers)
    metric, count = parse_auto(text, num_layers)
    return choose_layers(teacher, metric, count, device=default_device())
