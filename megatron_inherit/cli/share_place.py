"""How ``minherit share`` chooses the stage of each layer of a descendant: by a rule, a list, or a measurement."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy

    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.checkpoint.stream import Source

Stages = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The placement of a descendant.

    Attributes:
        stages: The stage of each layer.
        losses: Zero-shot loss in nats of each placement that was measured, best first.
        rules: The rule that gives each of them.
    """

    stages: Stages
    losses: dict[Stages, float]
    rules: dict[Stages, str]

    @property
    def loss(self) -> float | None:
        """The choice's own loss, None where nothing was measured."""
        return self.losses.get(self.stages)

    def table(self) -> list[str]:
        """Writes what was measured, a line a placement."""
        return [f"{loss:.4f} nats  {self.rules[s]:<12} {','.join(map(str, s))}" for s, loss in self.losses.items()]


def probe_windows(path: str, tokens: int, config: ModelConfig) -> numpy.ndarray | None:
    """Reads the first evaluation windows of a file, as many as hold about so many tokens and at least one.

    Args:
        path: File of windows; empty for none.
        tokens: How many to predict.
        config: The learngene's model.

    Returns:
        int64 [windows, sequence + 1].

    Raises:
        DataError: They hold ids beyond the vocabulary, or are longer than the model's positions.
    """
    if not path:
        return None
    from megatron_inherit.data.windows import EvalWindows

    found = EvalWindows.load(path).tokens
    length, largest = found.shape[1] - 1, int(found.max())
    if largest >= config.vocab_size:
        raise DataError(
            f"{path} holds token ids beyond the learngene's vocabulary.",
            got=largest,
            expected=f"below {config.vocab_size}",
            fix="Make windows with the teacher's tokenizer: minherit data windows.",
        )
    if length > config.max_positions:
        raise DataError(
            f"The windows of {path} are longer than the learngene's positions.",
            got=length,
            expected=f"at most {config.max_positions}",
            fix="Make shorter ones: minherit data windows --sequence-length.",
        )
    return found[: max(1, tokens // length)]


def choose(source: Source, depth: int, rule: str, windows: numpy.ndarray | None) -> Choice:
    """Chooses the placement of a descendant; ``auto`` measures what the rules give.

    Args:
        source: A learngene, or the training checkpoint of an auxiliary.
        depth: Layers of the descendant.
        rule: A rule, a list of stages, or ``auto``.
        windows: What ``auto`` is measured on.

    Raises:
        UsageError: The rule does not fit, or ``auto`` has nothing to measure on.
    """
    from megatron_inherit.sharing.expand import candidates, place
    from megatron_inherit.sharing.learngene import require_plan

    plan = require_plan(source)
    if rule != "auto":
        return Choice(place(plan, depth, rule), {}, {})
    if windows is None:
        raise UsageError(
            "--place auto measures placements.", fix="Pass --windows FILE ('minherit data windows' makes one)."
        )
    rules = candidates(plan, depth)
    losses = measure(source, rules, windows)
    ranked = dict(sorted(losses.items(), key=lambda item: item[1]))
    return Choice(next(iter(ranked)), ranked, rules)


def measure(source: Source, placements: Iterable[Stages], windows: numpy.ndarray) -> dict[Stages, float]:
    """Gives the zero-shot loss of descendants of one depth, nats a token."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_inherit.sharing.probe import probe_placements

    return probe_placements(source, placements, windows)
