from __future__ import annotations

import logging

import pytest

from megatron_inherit.cli import data_progress
from megatron_inherit.cli.data_progress import ProgressMeter
from megatron_inherit.data.jobs import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(data_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("megatron_inherit"), "propagate", True)
    return now


def test_progress_is_bytes_and_tokens_a_second_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with ProgressMeter("tokenize", total_bytes=8 * 2**20) as meter:
        for _ in range(4):
            clock[0] += 5
            meter.add(Progress(documents=10, text_bytes=2**20, tokens=500_000))
    half, whole, end = caplog.messages
    assert half == "tokenize: 20 documents, 2.00 MiB of 8.00 MiB (25%), 204.80 KiB/s, 100k tokens/s"
    assert whole == "tokenize: 40 documents, 4.00 MiB of 8.00 MiB (50%), 204.80 KiB/s, 100k tokens/s"
    assert end == whole


def test_a_failure_before_the_first_document_shows_no_progress(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(KeyError), ProgressMeter("ingest"):
        raise KeyError
    assert caplog.messages == []
    with pytest.raises(KeyboardInterrupt), ProgressMeter("ingest"):
        raise KeyboardInterrupt
    assert caplog.messages == ["ingest: interrupted; the same command goes on where it was"]
