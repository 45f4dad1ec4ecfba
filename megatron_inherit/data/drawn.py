"""What a run drew of each domain, said at its end and compared with the shares that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_inherit.base.log import get_logger
from megatron_inherit.base.quantities import format_count
from megatron_inherit.data.loader import Loader
from megatron_inherit.data.mixture import check_drawn

_log = get_logger(__name__)


def report_drawn(loader: Loader, samples: int, *, skipped: Sequence[tuple[int, int]] = ()) -> dict[str, int]:
    """Logs the tokens drawn per domain, and warns of each domain that is off its share by more than chance allows.

    Args:
        loader: What the run read.
        samples: The run read samples ``[0, samples)``.
        skipped: But not these ranges ``[start, stop)``.

    Returns:
        Domain to its tokens.
    """
    drawn = loader.drawn(0, samples)
    for start, stop in skipped:
        for name, tokens in loader.drawn(start, min(stop, samples)).items():
            drawn[name] -= tokens
    weights = {domain.name: domain.weight for domain in loader.stream.domains if domain.weight}
    total = max(1, sum(drawn.values()))
    for name, tokens in drawn.items():
        share = f"{100 * tokens / total:.2f}%"
        intended = f" ({100 * weights[name]:.2f}% intended)" if name in weights else ""
        _log.info("drawn: %s %s tokens, %s%s", name, format_count(tokens), share, intended)
    for problem in check_drawn(drawn, weights, sequence_length=loader.sequence_length):
        _log.warning("off its share: %s", problem)
    return drawn
