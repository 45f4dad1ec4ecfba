"""Repairs of a cut: what can be fitted in closed form, without training, so that a student starts closer.

The student's last hidden state is not what the teacher's final norm and head expect. With x the student's normalised
hidden state before the gain, y the teacher's final norm output and W the head, over the tokens of a few windows:

- ``final-norm``: the gain g (and bias b) that minimise sum |W (g x + b - y)|^2, one linear system of the width's size.
- ``affine``: the matrix M that minimises sum |M x - y|^2; the student's head becomes W M, its final gain 1. It unties a
  tied head.
- ``block-scale``: after a gap in the layer list, each block's two output projections times one scalar, fitted block by
  block so that the stream comes closest to what the next block saw in the teacher.
- ``keep-last:M``: no fit; the last M blocks of the choice are replaced by the teacher's last M.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.cut import Cut, block_kwargs, output_projections
from megatron_inherit.eval.hf_folder import as_hf_folder, load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

METHODS = ("final-norm", "affine", "block-scale")
RIDGE = 1e-4
SINGULAR = 1e-6
"""Singular values of a fitted map below this share of the largest one count as none."""
_log = get_logger(__name__)


@dataclass
class Repair:
    """What is to change in a student.

    Attributes:
        layers: The teacher's block of each student block.
        tensors: New values by canonical name.
        scales: Factors of inherited tensors by canonical name.
        untied: The student gets a head of its own.
        loss_before: Loss of the plain cut on held-out windows, nats a token.
        loss_after: Loss of the repaired one on the same windows.
    """

    layers: tuple[int, ...]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    untied: bool = False
    loss_before: float = 0.0
    loss_after: float = 0.0


def parse_repair(text: str) -> tuple[int, list[str]]:
    """Reads ``--repair``: methods separated by commas.

    Returns:
        Blocks of ``keep-last`` (0 without it), and the fits in the order in which they are made.

    Raises:
        UsageError: A method is unknown, or two exclude each other.
    """
    keep, fits = 0, []
    for word in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"keep-last:(\d+)", word)
        if found:
            keep = int(found[1])
        elif word in METHODS:
            fits.append(word)
        else:
            raise UsageError(f"--repair: unknown method {word!r}.", expected=f"keep-last:M, {', '.join(METHODS)}")
    if {"final-norm", "affine"} <= set(fits):
        raise UsageError("--repair: affine includes what final-norm fits.", fix="Take one of them.")
    return keep, sorted(fits, key=("block-scale", "final-norm", "affine").index)


def keep_last(layers: Sequence[int], count: int, depth: int) -> tuple[int, ...]:
    """Replaces the end of a choice by the teacher's last blocks.

    Raises:
        UsageError: There are not so many blocks.
    """
    if count > len(layers):
        raise UsageError(
            f"keep-last:{count} asks for more blocks than the student has.", expected=f"at most {len(layers)}"
        )
    return (*layers[: len(layers) - count], *range(depth - count, depth))


def fit_repair(
    teacher: Path | str,
    layers: Sequence[int],
    methods: str,
    *,
    text: Path | str | None = None,
    sequences: int = 32,
    tokens: int = 256,
    device: str = "cpu",
) -> Repair:
    """Fits the repairs on windows of a text and measures them on others.

    Args:
        teacher: A checkpoint of any format.
        layers: The teacher's block of each student block.
        methods: See ``parse_repair``.
        text: See ``calibration.sample_windows``.
        sequences: Windows to fit on; a quarter as many more are held out.
        tokens: Length of each.
        device: ``cpu`` or ``cuda``.
    """
    keep, fits = parse_repair(methods)
    with as_hf_folder(teacher) as folder:
        model = load_model(folder, device=device)
        tokens = min(tokens, model.config.max_position_embeddings)
        held = max(1, sequences // 4)
        windows = sample_windows(load_tokenizer(folder), text, sequences=sequences + held, tokens=tokens).to(device)
    step = len(windows) // held
    held_out, fitted = windows[step - 1 :: step][:held], windows[[i for i in range(len(windows)) if (i + 1) % step]]
    layers = tuple(layers)
    plain = Cut(model, layers).loss(held_out)
    repair = Repair(keep_last(layers, keep, model.config.num_hidden_layers) if keep else layers, loss_before=plain)
    cut = Cut(model, repair.layers)
    if "block-scale" in fits:
        rescale_blocks(cut, fitted, repair)
    if refit := {"final-norm": refit_final_norm, "affine": refit_head}.get(fits[-1] if fits else ""):
        refit(cut, cut.student_states(fitted), cut.teacher_states(fitted), repair)
    repair.loss_after = cut.loss(held_out)
    _log.info("Repair %s: held-out loss %.3f, the plain cut's %.3f.", methods, repair.loss_after, plain)
    if repair.loss_after >= plain:
        _log.warning("The repair does not help this cut on held-out text: leave it out.")
    return repair


def fit_gain(
    x: torch.Tensor, y: torch.Tensor, head: torch.Tensor, *, bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Solves for the gain, and the bias, that bring the logits closest to the teacher's.

    Args:
        x: Normalised hidden states of the student [tokens, width].
        y: What the teacher's final norm gave [tokens, width].
        head: [vocabulary, width]; logits are compared up to a constant a token.
        bias: Fits one.

    Returns:
        Gain [width], bias [width] or None, in float64.
    """
    import torch

    x, y, head = x.double(), y.double(), head.double()
    centred = head - head.mean(dim=0)
    metric = centred.T @ centred
    matrix, right = metric * (x.T @ x), (x * (y @ metric)).sum(dim=0)
    if bias:
        cross = x.sum(dim=0)[:, None] * metric
        matrix = torch.cat([torch.cat([matrix, cross], 1), torch.cat([cross.T, len(x) * metric], 1)])
        right = torch.cat([right, metric @ y.sum(dim=0)])
    matrix.diagonal().add_(RIDGE * matrix.diagonal().mean())
    solved = torch.linalg.solve(matrix, right)
    width = x.shape[1]
    return solved[:width], solved[width:] if bias else None


def fit_map(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Solves for the matrix M [width, width] that brings M x closest to y, both [tokens, width], in float64."""
    import torch

    x, y = x.double(), y.double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T


def refit_final_norm(cut: Cut, x: torch.Tensor, y: torch.Tensor, repair: Repair) -> None:
    """Fits gain and bias of the final norm to states [tokens, width] of student and teacher."""
    gain, bias = fit_gain(x, y, cut.head, bias=cut.has_bias)
    cut.set_final_norm(gain, bias)
    repair.tensors["final_norm.weight"] = gain.float()
    if bias is not None:
        repair.tensors["final_norm.bias"] = bias.float()


def refit_head(cut: Cut, x: torch.Tensor, y: torch.Tensor, repair: Repair) -> None:
    """Fits a map of states [tokens, width] of the student to the teacher's, folded into a head of its own."""
    import torch

    width = x.shape[1]
    gain, bias = torch.ones(width), None
    if cut.has_bias:
        x, y = (torch.cat([states, states.new_ones(len(states), 1)], dim=1) for states in (x, y))
    matrix = fit_map(x, y)
    if cut.has_bias:
        # a LayerNorm's output sums to zero, so that the map is singular in that direction
        bias = (torch.linalg.pinv(matrix[:width, :width], rtol=SINGULAR) @ matrix[:width, width]).float()
        repair.tensors["final_norm.bias"] = bias
    cut.head = (cut.head.double() @ matrix[:width, :width]).float()
    cut.set_final_norm(gain, bias)
    repair.untied = True
    repair.tensors |= {"final_norm.weight": gain, "head.weight": cut.head}


def rescale_blocks(cut: Cut, windows: torch.Tensor, repair: Repair) -> None:
    """Fits a factor a block on windows [sequences, tokens]; a block before the first gap is exact and stays."""
    import torch

    hidden, kwargs = block_kwargs(cut.model, windows)
    targets = cut.teacher_inputs(hidden, kwargs)
    exact = True
    for place, layer in enumerate(cut.layers):
        following = cut.layers[place + 1] if place + 1 < len(cut.layers) else cut.depth
        exact = exact and layer == place and following == layer + 1
        with torch.no_grad():
            out = cut.run_block(place, hidden, kwargs)
            if not exact:
                factor = _factor(out - hidden, targets[following] - hidden, targets[following])
                cut.scale_block(place, factor)
                names = output_projections(cut.blocks[place])
                repair.scales |= {f"layers.{place}.{name}": factor for name in names}
                out = cut.run_block(place, hidden, kwargs)
        hidden = out


def _factor(step: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor) -> float:
    """Solves for the scalar; tokens weigh alike whatever their norm, and the first, an outlier, is left out."""
    step, wanted = step[:, 1:].double(), wanted[:, 1:].double()
    weight = 1 / target[:, 1:].double().pow(2).sum(dim=-1, keepdim=True)
    return float((weight * step * wanted).sum() / (weight * step * step).sum())
