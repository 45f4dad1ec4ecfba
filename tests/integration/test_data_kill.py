"""Kill -9 at every durable write of each stage: the next run ends with the same bytes and leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.temporary import locked, temporary_beside
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.manifests import SubsetOptions
from megatron_inherit.data.opening import open_stream
from megatron_inherit.data.prepare import make_windows
from megatron_inherit.data.tokenize import TokenizeOptions, tokenize
from megatron_inherit.data.windows import EvalWindows
from tests.support.text_data import make_texts, write_jsonl

OPTIONS = IngestOptions(layout="redpajama", shard_bytes=3000)
SUBSET = SubsetOptions(tokens=5000, valid_share=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number, domain in enumerate(("c4", "arxiv")):
        write_jsonl(folder / f"{domain}.jsonl", make_texts(40, seed=number))
    return folder


def killed_after(writes: int, work: Callable[[], object]) -> bool:
    """Runs ``work`` in a child that kills itself at its n-th fsync or rename; tells whether it came so far."""
    child = os.fork()
    if child == 0:
        left = writes

        def counting(function: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.fsync, os.replace, os.rename = counting(os.fsync), counting(os.replace), counting(os.rename)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    """Data files by name; records hold times and are compared by what they open to."""
    kinds = {".jsonl", ".bin", ".idx", ".docs", ".starts", ".ends"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in kinds}


def crash_everywhere(folder: Path, work: Callable[[Path], object], finished: Callable[[Path], object]) -> int:
    """Kills at each write in turn; each time the folder is unfinished, or right, and a second run makes it right."""
    work(folder / "reference")
    expected = contents(folder / "reference")
    for writes in itertools.count():
        out = folder / str(writes)
        if not killed_after(writes, partial(work, out)):
            return writes
        if (out / "manifest.json").is_file():
            finished(out)
        work(out)
        finished(out)
        assert contents(out) == expected
        assert not list(folder.rglob("*.tmp-*"))
    raise AssertionError


def test_ingest_survives_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    def work(out: Path) -> None:
        ingest([str(source)], out, OPTIONS)

    assert crash_everywhere(tmp_path, work, work) > 10


def test_tokenize_survives_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    ingest([str(source)], tmp_path / "text", OPTIONS)

    def work(out: Path) -> None:
        tokenize(tmp_path / "text", out, TokenizeOptions(tokenizer="bytes"))

    assert crash_everywhere(tmp_path, work, lambda out: open_stream(out, "all", verify="full")) > 30


def test_subset_survives_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    ingest([str(source)], tmp_path / "text", OPTIONS)
    tokenize(tmp_path / "text", tmp_path / "tokens", TokenizeOptions(tokenizer="bytes"))

    def work(out: Path) -> None:
        if not (out / "manifest.json").is_file():
            make_subset([str(tmp_path / "tokens")], out, SUBSET)

    assert crash_everywhere(tmp_path, work, lambda out: open_stream(out, "train", verify="full")) > 5


def test_a_subset_that_is_replaced_survives_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    """The old one or the new one is there at any time; what was left is removed by the next run, with a message."""
    ingest([str(source)], tmp_path / "text", OPTIONS)
    tokenize(tmp_path / "text", tmp_path / "tokens", TokenizeOptions(tokenizer="bytes"))
    for writes in itertools.count():
        out = tmp_path / str(writes)
        make_subset([str(tmp_path / "tokens")], out, SUBSET)
        draw = SUBSET.model_copy(update={"tokens": 3000})
        work = partial(make_subset, [str(tmp_path / "tokens")], out, draw, overwrite=True)
        if not killed_after(writes, work):
            break
        assert open_stream(out, "train", verify="full").spans.num_tokens in (3000, 5000)
        work()
        assert open_stream(out, "train", verify="full").spans.num_tokens == 3000
        assert not list(tmp_path.rglob("*.tmp-*"))
    assert writes > 5


def test_merging_and_preprocess_data_survive_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "preprocess_data.py"))["main"]

    def work(out: Path) -> None:
        out.mkdir(exist_ok=True)
        words = ["--input", str(source / "*.jsonl"), "--output-prefix", str(out / "merged"), "--append-eod"]
        assert tool([*words, "--tokenizer-type", "ByteLevelTokenizer"]) == 0

    def finished(out: Path) -> None:
        if (out / "merged_text_document.idx").is_file():
            assert IndexedFile(out / "merged_text_document").num_documents == 80

    assert crash_everywhere(tmp_path, work, finished) > 30


def test_windows_survive_kill_9_anywhere(source: Path, tmp_path: Path) -> None:
    ingest([str(source)], tmp_path / "text", OPTIONS)
    tokenize(tmp_path / "text", tmp_path / "tokens", TokenizeOptions(tokenizer="bytes"))
    make_subset([str(tmp_path / "tokens")], tmp_path / "subset", SUBSET)
    path = tmp_path / "windows.safetensors"
    work = partial(make_windows, tmp_path / "subset", path, tokenizer="bytes", sequence_length=16, windows=8)
    expected = work().fingerprint
    writes = 0
    while path.unlink() is None and killed_after(writes, work):
        assert not path.exists() or EvalWindows.load(path).fingerprint == expected
        assert work().fingerprint == expected
        writes += 1
    assert writes == 3, "fsync of the file, rename, fsync of the folder"


def test_what_a_killed_run_left_is_said_and_a_living_one_is_spared(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_inherit"), "propagate", True)
    ingest([str(source)], tmp_path / "text", OPTIONS)
    tokenize(tmp_path / "text", tmp_path / "tokens", TokenizeOptions(tokenizer="bytes"))
    out, draw = tmp_path / "subset", partial(make_subset, [str(tmp_path / "tokens")])
    left = temporary_beside(out)
    left.mkdir()
    (left / "spans-0-0").write_bytes(b"x" * 100)
    with locked(left), pytest.raises(UsageError, match="Another job is writing"):
        draw(out, SUBSET)
    assert left.is_dir()
    draw(out, SUBSET)
    assert not left.exists()
    assert f"{left} was left by a process that was killed; it is removed" in caplog.text
    assert not list(out.glob(".*")), "the lock is the folder's own"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_parallel_job_leaves_no_process_and_goes_on(source: Path, tmp_path: Path, how: signal.Signals) -> None:
    write_jsonl(tmp_path / "big" / "c4.jsonl", make_texts(60_000, seed=5))
    ingest([str(tmp_path / "big")], tmp_path / "text", IngestOptions(layout="redpajama", shard_bytes=500_000))
    tokenize(tmp_path / "text", tmp_path / "reference", TokenizeOptions(tokenizer="bytes"))
    words = ["data", "tokenize", str(tmp_path / "text"), str(tmp_path / "out"), "-t", "bytes", "--workers", "2"]
    command = [sys.executable, "-m", "megatron_inherit", *words]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("c4/*.json")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if how == signal.SIGINT:  # Ctrl-C reaches the whole group
        os.killpg(job.pid, how)
    else:
        job.kill()
    _, shown = job.communicate(timeout=60)
    if how == signal.SIGINT:
        assert job.returncode == 130
        assert "interrupted; the same command goes on where it was" in shown
        assert "Traceback" not in shown
    while _group_is_alive(job.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_is_alive(job.pid), "workers end with their parent"
    tokenize(tmp_path / "text", tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
