"""Byte ranges of files behind URLs, by fsspec: ``http(s)://``, ``s3://``, ``hf://`` and what else it knows.

Ranges are cut in chunks; a chunk whose connection breaks is asked for again, so a transfer goes on where it was.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import disk_error
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.checkpoint.files import MissingFileError

CHUNK = 8 << 20
ATTEMPTS = 5
FIRST_WAIT = 0.5
_ABSENT = (401, 403, 404, 410)
_KNOWN_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "provenance.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
_log = get_logger(__name__)


class RemoteFiles:
    """Sizes and ranges of remote files; safe to use from several threads."""

    def __init__(self) -> None:
        self._systems: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._spools: dict[str, _Spool] = {}
        self._lock = threading.Lock()

    def size(self, url: str) -> int:
        """Gives a file's size in bytes.

        Raises:
            CheckpointError: It is not there or the server does not say.
        """
        found = self._sizes.get(url)
        if found is None:
            found = self._retry(url, lambda system: system.size(url))
            if found is None:
                raise CheckpointError(f"{url}: the server does not tell the size.", fix="Download the file first.")
            self._sizes[url] = int(found)
        return self._sizes[url]

    def state(self, url: str) -> str:
        """Gives what the server says of a file: its size, and tag, version or time where there are some.

        Raises:
            CheckpointError: It is not there.
        """
        info = self._retry(url, lambda system: system.info(url))
        return str(sorted((str(key), str(value)) for key, value in dict(info).items()))

    def names(self, folder: str, patterns: Sequence[str]) -> list[str]:
        """Lists the files of a folder that match a pattern; plain web servers are asked for the usual names.

        Raises:
            CheckpointError: The server cannot be reached.
        """
        if folder.partition("://")[0] in ("http", "https"):
            return [name for name in _KNOWN_NAMES if self.exists(f"{folder.rstrip('/')}/{name}")]
        entries = self._retry(folder, lambda system: system.ls(folder, detail=False))
        names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    def exists(self, url: str) -> bool:
        """Tells whether a file is there.

        Raises:
            CheckpointError: The server cannot be reached.
        """
        try:
            self.size(url)
        except MissingFileError:
            return False
        return True

    def read_into(self, url: str, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from the bytes at ``offset``.

        Raises:
            CheckpointError: The file is too short, the server ignores ranges, or it cannot be reached.
        """
        if offset + len(buffer) > self.size(url):
            raise CheckpointError(
                f"{url} is truncated.", got=f"{self.size(url)} bytes", expected=f"at least {offset + len(buffer)}"
            )
        spool = self._spools.get(url)
        if spool is not None and spool.read_into(offset, buffer):
            return
        for start in range(0, len(buffer), CHUNK):
            part = buffer[start : start + CHUNK]
            self._fill(url, offset + start, part)

    def spool(self, url: str, start: int, stop: int) -> None:
        """Brings bytes here that will be read in many small pieces, each byte once: into a nameless temporary file.

        Raises:
            CheckpointError: They cannot be fetched.
            DiskError: There is no room for them.
        """
        with self._lock:
            spool = self._spools.setdefault(url, _Spool())
        with spool.lock:
            for low, high in spool.missing(start, stop):
                for at in range(low, high, CHUNK):
                    data = bytearray(min(CHUNK, high - at))
                    self._fill(url, at, memoryview(data))
                    spool.add(at, data)

    def close(self) -> None:
        """Forgets the connections and what was brought here."""
        self._systems.clear()
        for spool in self._spools.values():
            spool.file.close()
        self._spools.clear()

    def _fill(self, url: str, offset: int, part: memoryview) -> None:
        def fetch(system: Any) -> bytes:
            # systems without ranges of their own read through a file object, which would read ahead
            plain = {} if system.async_impl else {"cache_type": "none"}
            data = system.cat_file(url, start=offset, end=offset + len(part), **plain)
            if len(data) > len(part):
                raise CheckpointError(
                    f"{url}: the server does not serve ranges.", fix="Download the folder and give its path."
                )
            if len(data) < len(part):
                raise ConnectionError(f"{len(data)} of {len(part)} bytes came")
            return data

        part[:] = self._retry(url, fetch)

    def _retry(self, url: str, action: Any) -> Any:
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action(self._system(url))
            except CheckpointError:
                raise
            except Exception as error:  # connection errors of each protocol have their own classes
                if _is_absence(error):
                    raise MissingFileError(f"{url} is missing.", fix="Check the address.") from error
                if attempt == ATTEMPTS:
                    raise CheckpointError(
                        f"{url} cannot be read after {ATTEMPTS} attempts: {_reason(error)}.",
                        fix="Check the address and the network, then run the command again.",
                    ) from error
                _log.warning("%s: %s; attempt %d of %d in %.1f s", url, _reason(error), attempt + 1, ATTEMPTS, wait)
                time.sleep(wait)
                wait *= 2
        return None

    def _system(self, url: str) -> Any:
        protocol = url.partition("://")[0]
        with self._lock:
            if protocol not in self._systems:
                self._systems[protocol] = _open_system(protocol)
            return self._systems[protocol]


class _Spool:
    """The parts of one remote file that are here, at their own offsets in a sparse file without a name."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the pool)
        self.lock = threading.Lock()
        self._parts: list[tuple[int, int]] = []

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Gives the ranges between two offsets that are not here."""
        gaps = []
        for low, high in self._parts:
            if high > start and low < stop:
                if low > start:
                    gaps.append((start, low))
                start = high
        return [*gaps, (start, stop)] if start < stop else gaps

    def add(self, at: int, data: bytes | bytearray) -> None:
        """Stores bytes."""
        try:
            os.pwrite(self.file.fileno(), data, at)
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        parts = sorted([*self._parts, (at, at + len(data))])
        joined = parts[:1]
        for low, high in parts[1:]:
            if low <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(high, joined[-1][1])
            else:
                joined.append((low, high))
        self._parts = joined

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fills a buffer if all its bytes are here."""
        if self.missing(offset, offset + len(buffer)):
            return False
        return os.preadv(self.file.fileno(), [buffer], offset) == len(buffer)


def _is_absence(error: Exception) -> bool:
    """Tells a file that is not there from one that cannot be had now, which fsspec calls by the same name.

    Stores that may not be listed answer 403 for what they do not have.
    """
    cause = error.__cause__
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    if not isinstance(error, FileNotFoundError):
        return False
    return status in _ABSENT if status is not None else cause is None or isinstance(cause, FileNotFoundError)


def _reason(error: Exception) -> str:
    """Says what went wrong with a connection."""
    found = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return f"{type(found).__name__}: {found}"


def _open_system(protocol: str) -> Any:
    fsspec = require("fsspec", f"{protocol}:// addresses")
    if protocol == "hf":
        require("huggingface_hub", "hf:// addresses")
    if protocol == "s3":
        require("s3fs", "s3:// addresses")
    if protocol not in ("http", "https"):
        return fsspec.filesystem(protocol)
    timeout = require("aiohttp", "web addresses").ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return fsspec.filesystem(protocol, client_kwargs={"timeout": timeout}, use_listings_cache=False)
