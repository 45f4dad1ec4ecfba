"""A full disk stops each stage with exit code 7 and the file's name; with room again the same call goes on."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_inherit.base.errors import DiskError
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.manifests import SubsetOptions
from megatron_inherit.data.merge import merge_domains
from megatron_inherit.data.opening import open_stream
from megatron_inherit.data.prepare import make_windows
from megatron_inherit.data.tokenize import TokenizeOptions, tokenize
from megatron_inherit.data.windows import EvalWindows
from tests.support.text_data import make_texts, write_jsonl


def message_at_limit(limit: int, work: Callable[[], object]) -> str:
    """Runs ``work`` in a child whose files may not grow beyond ``limit`` bytes; gives the message of its DiskError."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
            os.write(send, b"no error")
        except DiskError as error:
            os.write(send, f"{error.exit_code} {error}".encode())
        except BaseException as error:
            os.write(send, repr(error).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "in" / "c4.jsonl", make_texts(400, longest=200))
    ingest([str(tmp_path / "in")], tmp_path / "text", IngestOptions(shard_bytes=40_000))
    tokenize(tmp_path / "text", tmp_path / "tokens", TokenizeOptions(tokenizer="bytes"))
    make_subset([str(tmp_path / "tokens")], tmp_path / "subset", SubsetOptions(valid_share=0.3))
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "limit", "named"),
    [
        ("ingest", 30_000, "again/text/000000-0000.jsonl"),
        ("ingest zst", 10_000, "again/text/000000-0000.jsonl.zst"),
        ("tokenize", 70_000, "again/text/000000-0000"),
        ("subset", 4_000, "again"),
        ("merge", 300_000, "again"),
        ("windows", 4_000, "again.safetensors"),
    ],
)
def test_a_full_disk_is_said_and_room_is_all_it_takes(folder: Path, stage: str, limit: int, named: str) -> None:
    out = folder / "again"
    source = [str(folder / "in")]
    windows = folder / "again.safetensors"
    works: dict[str, Callable[[], object]] = {
        "ingest": partial(ingest, source, out, IngestOptions(shard_bytes=40_000)),
        "ingest zst": partial(ingest, source, out, IngestOptions(compression="zst")),
        "tokenize": partial(tokenize, folder / "text", out, TokenizeOptions(tokenizer="bytes")),
        "subset": partial(make_subset, [str(folder / "tokens")], out, SubsetOptions()),
        "merge": partial(merge_domains, folder / "tokens", {"text": out}),
        "windows": partial(make_windows, folder / "subset", windows, tokenizer="bytes", sequence_length=64, windows=20),
    }
    message = message_at_limit(limit, works[stage])
    assert message.startswith(f"7 The disk is full while writing {folder / named}"), message
    works[stage]()
    assert not list(folder.rglob("*.tmp-*"))
    if stage == "tokenize":
        open_stream(out, "all", verify="full")
    elif stage == "subset":
        open_stream(out, "train", verify="full")
    elif stage == "merge":
        assert IndexedFile(out).num_documents == 400
    elif stage == "windows":
        assert len(EvalWindows.load(windows)) == 20
