"""Web servers on this machine that serve a folder by ranges, count what they send and hang up when asked to."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``folder``.

    Attributes:
        sent: Bytes of safetensors files that were sent.
        ranges: Whether ranges are honoured.
        drop_every: Hangs up in the middle of every n-th answer; 0 never.
        busy: How many requests for each file are answered with 503 before it is served.
        absent: Status of a file that is not there.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[FileHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder, self.sent, self.requests, self.dropped = folder, 0, 0, 0
        self.ranges, self.drop_every, self.busy, self.absent = True, 0, 0, 404
        self.asked: dict[Path, int] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class FileHandler(http.server.BaseHTTPRequestHandler):
    """A plain web server; subclasses speak a store's own dialect around it."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_HEAD(self):
        self.send_file(self.locate(), body=False)

    def do_GET(self):
        self.send_file(self.locate(), body=True)

    def locate(self) -> Path:
        """Gives the file that a request names."""
        return self.server.folder / self.path.lstrip("/")

    def send_file(self, path: Path, *, body: bool, headers: tuple[tuple[str, str], ...] = ()):
        asked = self.server.asked[path] = self.server.asked.get(path, 0) + 1
        if not path.is_file() or asked <= self.server.busy:
            self.send_data(b"", status=503 if asked <= self.server.busy else self.server.absent)
            return
        data, size = path.read_bytes(), path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        ranged = wanted and self.server.ranges
        if ranged:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
            headers = (*headers, ("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{size}"))
        self.server.requests += 1
        drop = body and self.server.drop_every and self.server.requests % self.server.drop_every == 0
        self.send_data(data, status=206 if ranged else 200, body=body, drop=bool(drop), headers=headers)
        if body and not drop and path.suffix == ".safetensors":
            self.server.sent += len(data)

    def send_data(self, data: bytes, *, status=200, kind="application/octet-stream", body=True, drop=False, headers=()):
        self.send_response(status)
        for name, value in (("Accept-Ranges", "bytes"), ("Content-Type", kind), *headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if drop:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.server.dropped += 1
        elif body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder: Path, handler: type[FileHandler] = FileHandler) -> Iterator[FileServer]:
    """Serves a folder while the block runs."""
    server = FileServer(folder, handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
