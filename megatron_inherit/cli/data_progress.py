"""How ``minherit data`` shows work and findings: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.log import get_logger
from megatron_inherit.base.quantities import format_bytes, format_count

if TYPE_CHECKING:
    from megatron_inherit.data.inspection import Summary
    from megatron_inherit.data.jobs import Progress

_LINE_EVERY = 10.0
_BAR_WIDTH = 40
_log = get_logger(__name__)


class ProgressMeter:
    """Adds up what tasks report and shows it with its rate.

    Args:
        name: What is being done.
        total_bytes: Bytes of text in all, if they are known.
    """

    def __init__(self, name: str, total_bytes: int | None = None) -> None:
        self._name, self._total = name, total_bytes
        self._documents = self._bytes = self._tokens = 0
        self._begun = self._shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressMeter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, text="")
        return self

    def add(self, progress: Progress) -> None:
        """Takes what was done since the last report."""
        self._documents += progress.documents
        self._bytes += progress.text_bytes
        self._tokens += progress.tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, text=self._text(now))
        elif now - self._shown >= _LINE_EVERY:
            self._shown = now
            _log.info("%s: %s", self._name, self._text(now))

    def _text(self, now: float) -> str:
        seconds = max(1e-6, now - self._begun)
        if not self._bytes:
            return f"{self._documents} documents, {format_count(self._documents / seconds)} a second"
        done = format_bytes(self._bytes)
        if self._total:
            done += f" of {format_bytes(self._total)} ({100 * self._bytes / self._total:.0f}%)"
        rate = f"{format_bytes(self._bytes / seconds)}/s"
        tokens = f", {format_count(self._tokens / seconds)} tokens/s" if self._tokens else ""
        return f"{self._documents} documents, {done}, {rate}{tokens}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt:
            _log.warning("%s: interrupted; the same command goes on where it was", self._name)
        if self._documents:
            _log.info("%s: %s", self._name, self._text(time.monotonic()))


def summary_lines(summary: Summary) -> Iterator[str]:
    """Writes a summary as a table of domains, a histogram of lengths and single figures."""
    name = summary.kind + (f" ({summary.split})" if summary.split else "")
    documents = sum(domain.documents for domain in summary.domains)
    tokens = sum(domain.tokens or 0 for domain in summary.domains)
    yield f"{name}: {documents} documents" + (f", {tokens} tokens" if tokens else "")
    yield f"{'domain':<16}{'documents':>12}{'tokens':>16}{'text':>12}{'share':>9}{'weight':>9}{'unique':>16}"
    for domain in summary.domains:
        cells = (
            f"{domain.documents:>12}",
            f"{domain.tokens:>16}" if domain.tokens is not None else " " * 16,
            f"{format_bytes(domain.text_bytes):>12}" if domain.text_bytes is not None else " " * 12,
            f"{100 * domain.share:>8.2f}%" if domain.share is not None else " " * 9,
            f"{100 * domain.weight:>8.2f}%" if domain.weight is not None else " " * 9,
            f"{domain.unique_tokens:>16}" if domain.unique_tokens is not None else "",
        )
        yield f"{domain.name:<16}{''.join(cells)}".rstrip()
    if summary.bytes_per_token is not None:
        yield f"{summary.bytes_per_token:.3f} bytes a token"
    if summary.duplicates is not None:
        yield f"{summary.duplicates} exact duplicates" + (" left out" if summary.kind == "subset" else "")
    if summary.tokenizer:
        made = summary.tokenizer
        eos, bos = (made.append_eos, made.eos_id), (made.prepend_bos, made.bos_id)
        ends = ", ".join(
            f"{name} {one if added else 'not added'}" for name, (added, one) in (("EOS", eos), ("BOS", bos))
        )
        yield f"tokenizer {made.path} ({made.kind}, {made.vocab_size} ids, {ends})"
    most = max(summary.histogram.values(), default=0)
    for exponent, count in summary.histogram.items():
        bar = "#" * -(-count * _BAR_WIDTH // most)
        yield f"{2**exponent:>9}-{2 ** (exponent + 1) - 1:<9} tokens {count:>12} {bar}"
