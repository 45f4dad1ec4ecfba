"""A teacher behind a web server that counts what it sends and hangs up now and then."""

from pathlib import Path

import pytest
import torch

from megatron_inherit.checkpoint import manifest, remote
from megatron_inherit.checkpoint.compare import compare
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from tests.support.checkpoints import gpt2, llama, random_arrays, write_checkpoint
from tests.support.file_server import serving

CONFIG = llama(num_layers=8, hidden_size=64, head_dim=8, ffn_size=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote")
    write_checkpoint(path / "teacher", CONFIG, random_arrays(CONFIG), "hf", max_shard_bytes=400_000)
    (path / "teacher" / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        server.url = f"{server.address}/teacher"
        yield server


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


def test_transposed_tensors_come_whole_and_once(tmp_path, monkeypatch):
    """GPT-2's queries, keys and values are stripes of one stored tensor; a request a run would be thousands."""
    monkeypatch.setattr(manifest, "LARGE_TILE_BYTES", 1 << 17)
    config = gpt2(num_layers=3, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=32, ffn_size=1024)
    teacher = write_checkpoint(tmp_path / "teacher", config, random_arrays(config), "hf", max_shard_bytes=4_000_000)
    with serving(tmp_path) as server:
        words = ["--layers", "2,0", "--threads", "3"]
        assert main(["inherit", f"{server.address}/teacher", str(tmp_path / "student"), *words]) == 0
    assert main(["verify", str(teacher), str(tmp_path / "student")]) == 0
    with open_source(tmp_path / "student") as student:
        selected = sum(stored.nbytes for stored in student.tensors.values())
    headers = 20_000
    assert selected <= server.sent <= 1.02 * selected + headers
    assert server.requests < 150


def test_dropped_connections_are_taken_up_again(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    server.drop_every = 5
    assert main(["inherit", server.url, str(tmp_path / "remote"), "--layers", "3,1"]) == 0
    assert server.dropped > 3
    assert main(["inherit", str(folder / "teacher"), str(tmp_path / "local"), "--layers", "3,1"]) == 0
    assert main(["verify", str(tmp_path / "remote"), str(tmp_path / "local")]) == 0


def test_a_busy_server_costs_neither_tokenizer_nor_licence(server, folder, tmp_path, monkeypatch, caplog):
    """fsspec calls a file that cannot be had now one that is not there."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    (folder / "teacher" / "README.md").write_text("---\nlicense: openrail\n---\n")
    server.busy, server.absent = 4, 403
    assert main(["inherit", server.url, str(tmp_path / "s"), "--layers", "0"]) == 0
    assert (tmp_path / "s" / "tokenizer.json").read_text() == "{}"
    assert "license: openrail" in (tmp_path / "s" / "README.md").read_text()
    assert not (tmp_path / "s" / "LICENSE").exists()


def test_a_server_that_stays_busy_is_not_one_without_files(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    server.busy = 10**6
    assert main(["inherit", server.url, str(tmp_path / "s"), "--layers", "0"]) == 5
    told = capsys.readouterr().err
    assert "config.json cannot be read after 5 attempts: ClientResponseError: 503" in told
    assert not (tmp_path / "s").exists()


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


def test_a_remote_bin_is_refused_with_what_to_do(folder, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((folder / "teacher" / "config.json").read_bytes())
    torch.save({"lm_head.weight": torch.ones(2)}, tmp_path / "old" / "pytorch_model.bin")
    with serving(tmp_path) as server:
        assert main(["inherit", f"{server.address}/old", str(tmp_path / "student"), "--layers", "0"]) == 5
    message = capsys.readouterr().err
    assert "pytorch_model.bin is not safetensors" in message
    assert "Download the folder" in message


def test_a_missing_address(server, tmp_path, capsys):
    assert main(["inherit", server.url + "-not", str(tmp_path / "student"), "--layers", "0"]) == 5
    assert "config.json is missing" in capsys.readouterr().err


def test_a_transfer_goes_on_where_it_was(server, tmp_path, monkeypatch):
    words = ["convert", server.url, str(tmp_path / "s"), "--resume", "--threads", "1"]
    monkeypatch.setenv("MI_FAULT", "transfer:*:60:raise")
    assert main(words) != 0
    monkeypatch.delenv("MI_FAULT")
    first, server.sent = server.sent, 0
    assert main(words) == 0
    assert server.sent < first
    with open_source(tmp_path / "s") as left, open_source(server.url) as right:
        assert compare(left, right) == []
