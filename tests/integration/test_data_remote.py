"""Text behind ``http://`` and ``s3://``: the stores' own clients, servers of this machine."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.ingest import DocumentsManifest, IngestOptions, ingest
from tests.support.bucket_server import BucketHandler
from tests.support.file_server import FileServer, serving
from tests.support.text_data import make_texts, write_jsonl

pytest.importorskip("fsspec")
OPTIONS = IngestOptions(layout="redpajama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_jsonl(path / "bucket" / "rp" / "arxiv" / "a.jsonl", make_texts(300, seed=1))
    plain = write_jsonl(path / "c4.jsonl", make_texts(300, seed=2))
    (path / "bucket" / "rp" / "c4").mkdir()
    (path / "bucket" / "rp" / "c4" / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    pytest.importorskip("aiohttp")
    with serving(folder) as server:
        yield server


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def test_a_web_server_gives_what_the_disk_gives(folder: Path, server: FileServer, tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.table({"text": make_texts(200, seed=3)}), folder / "d.parquet", row_group_size=50)
    names = ["bucket/rp/arxiv/a.jsonl", "bucket/rp/c4/b.jsonl.gz", "d.parquet"]
    for kind, root in (("web", server.address), ("disk", str(folder))):
        ingest([f"{root}/{name}" for name in names], tmp_path / kind)
    assert shards(tmp_path / "web")
    assert sorted(shards(tmp_path / "web").values()) == sorted(shards(tmp_path / "disk").values())


def test_what_a_web_server_refuses_is_said(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        ingest([f"{server.address}/none.jsonl"], tmp_path / "a")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.jsonl "):
        ingest(["http://127.0.0.1:9/a.jsonl"], tmp_path / "b")


def test_a_connection_that_breaks_never_shortens_a_file(server: FileServer, tmp_path: Path) -> None:
    server.drop_every = 1
    with pytest.raises(DataError, match=r"a\.jsonl"):
        ingest([f"{server.address}/bucket/rp/arxiv/a.jsonl"], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    server.drop_every = 0
    manifest = ingest([f"{server.address}/bucket/rp/arxiv/a.jsonl"], tmp_path / "out")
    assert sum(shard.documents for shard in manifest.shards) == 300


@pytest.mark.slow
def test_a_bucket_gives_what_the_disk_gives_and_its_versions_are_kept(folder: Path, tmp_path: Path) -> None:
    """The command is a process of its own, as the client reads its endpoint when it is imported."""
    pytest.importorskip("s3fs")
    ingest([str(folder / "bucket" / "rp")], tmp_path / "disk", OPTIONS)
    with serving(folder, BucketHandler) as server:
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
        variables = {**os.environ, "AWS_ENDPOINT_URL": server.address, **keys}

        def run(source: str, out: str) -> subprocess.CompletedProcess[str]:
            words = ["data", "ingest", source, "-o", str(tmp_path / out), "--layout", "redpajama"]
            command = [sys.executable, "-m", "megatron_inherit", *words]
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)

        done = run("s3://bucket/rp", "s3")
        assert done.returncode == 0, done.stderr
        missing = run("s3://bucket/none", "none")
    assert missing.returncode == 4
    assert "s3://bucket/none does not exist, or holds no file" in missing.stderr
    assert shards(tmp_path / "s3") == shards(tmp_path / "disk")
    assert DocumentsManifest.load(tmp_path / "s3" / "manifest.json").sources == 2
