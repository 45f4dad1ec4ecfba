"""A teacher behind a web server that counts what it sends and hangs up now and then."""

import http.server
import re
import threading
from pathlib import Path

import pytest

from megatron_inherit.checkpoint import remote
from megatron_inherit.checkpoint.compare import compare
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint

CONFIG = llama(num_layers=8, hidden_size=64, head_dim=8, ffn_size=256)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, size = path.read_bytes(), path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{size}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        self.server.requests += 1
        if self.server.drop_every and self.server.requests % self.server.drop_every == 0:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.server.dropped += 1
            return
        self.wfile.write(data)
        if path.suffix == ".safetensors":
            self.server.sent += len(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote")
    write_checkpoint(path / "teacher", CONFIG, random_arrays(CONFIG), "hf", max_shard_bytes=400_000)
    (path / "teacher" / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def server(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.sent, server.requests, server.dropped = folder, 0, 0, 0
    server.ranges, server.drop_every = True, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/teacher"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_the_selected_bytes_are_fetched(server, folder, tmp_path):
    assert main(["inherit", server.url, str(tmp_path / "remote"), "--layers", "first:2"]) == 0
    assert main(["inherit", str(folder / "teacher"), str(tmp_path / "local"), "--layers", "first:2"]) == 0
    with open_source(tmp_path / "remote") as left, open_source(tmp_path / "local") as right:
        assert compare(left, right) == []
        selected = sum(stored.nbytes for stored in left.tensors.values())
    whole = sum(path.stat().st_size for path in Path(folder / "teacher").glob("*.safetensors"))
    headers = 20_000
    assert server.sent <= 1.02 * selected + headers
    assert server.sent < 0.4 * whole
    assert (tmp_path / "remote" / "tokenizer.json").read_text() == "{}"


def test_dropped_connections_are_taken_up_again(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    server.drop_every = 5
    assert main(["inherit", server.url, str(tmp_path / "remote"), "--layers", "3,1"]) == 0
    assert server.dropped > 3
    assert main(["inherit", str(folder / "teacher"), str(tmp_path / "local"), "--layers", "3,1"]) == 0
    assert main(["verify", str(tmp_path / "remote"), str(tmp_path / "local")]) == 0


def test_a_server_that_always_hangs_up_is_an_error(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    server.drop_every = 1
    assert main(["inherit", server.url, str(tmp_path / "student"), "--layers", "0"]) == 5
    assert "after 5 attempts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_server_without_ranges_is_an_error(server, tmp_path, capsys):
    server.ranges = False
    assert main(["inherit", server.url, str(tmp_path / "student"), "--layers", "0"]) == 5
    assert "does not serve ranges" in capsys.readouterr().err


def test_a_missing_address(server, tmp_path, capsys):
    assert main(["inherit", server.url + "-not", str(tmp_path / "student"), "--layers", "0"]) == 5
    assert "config.json is missing" in capsys.readouterr().err
