"""The hand-written container: torch and zipfile read it, the tensors are where the layout says."""

import zipfile
import zlib

import numpy as np
import pytest
import torch

from megatron_inherit.checkpoint.formats import pt_writer
from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque
from megatron_inherit.checkpoint.formats.pickle_reader import read_torch
from megatron_inherit.checkpoint.formats.pt_writer import Blank, create_archives, lay_out, patch_checksums


def write(path, value, contents=()):
    archive = lay_out(path.name, value)
    create_archives(path, [archive])
    with path.open("r+b") as file:
        for extent, data in zip(archive.extents, contents, strict=False):
            file.seek(extent.offset)
            file.write(data.tobytes())
    patch_checksums(path, archive.records)
    return archive


def test_torch_and_zipfile_read_what_was_laid_out(tmp_path):
    path = tmp_path / "file.pt"
    contents = [np.arange(15, dtype="f4"), np.arange(7, dtype="u2"), np.zeros(0, "i8"), np.array(3, "f8")]
    value = {
        "model": {"a": Blank("F32", (3, 5)), "b": Blank("BF16", (7,))},
        "numbers": [0, 255, 256, 70000, -1, 2**31, -(2**40), 2.5, None, True, "text", "text", "ü"],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "none": Blank("I64", (0, 4)),
        "step": Blank("F64", ()),
    }
    archive = write(path, value, contents)
    assert zipfile.ZipFile(path).testzip() is None
    assert all(extent.offset % 64 == 0 for extent in archive.extents)
    assert path.stat().st_size == archive.length
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert torch.equal(found["model"]["a"], torch.arange(15.0).reshape(3, 5))
        assert found["model"]["b"].view(torch.uint16).tolist() == list(range(7))
        assert found["none"].shape == (0, 4)
        assert found["step"].item() == 3
        assert found["numbers"] == value["numbers"]
        assert found["tuples"] == value["tuples"]


def test_records_become_the_objects_they_name(tmp_path):
    args = Opaque(Global("argparse", "Namespace"), (), {"layers": 3, "dtype": Global("torch", "bfloat16")})
    value = {"args": args, "bytes": b"\0\xff", "size": Opaque(Global("torch", "Size"), ((2, 3),))}
    write(tmp_path / "file.pt", value)
    found = torch.load(tmp_path / "file.pt", weights_only=False)
    assert vars(found["args"]) == {"layers": 3, "dtype": torch.bfloat16}
    assert found["bytes"] == b"\0\xff"
    assert found["size"] == torch.Size([2, 3])


def test_own_reader_reads_own_writer(tmp_path):
    path = tmp_path / "file.pt"
    archive = write(path, {"a": Blank("BF16", (4, 4)), "x": [1, "y"]}, [np.arange(16, dtype="u2")])
    found = read_torch(path)
    assert found["x"] == [1, "y"]
    assert (found["a"].offset, found["a"].shape) == (archive.extents[0].offset, (4, 4))


def test_archives_beyond_four_gigabytes(tmp_path):
    """The 64-bit forms of the headers, in a sparse file."""
    path = tmp_path / "large.pt"
    value = {"a": Blank("U8", (5 << 30,)), "b": Blank("F32", (2,)), "c": Blank("U8", (16,))}
    archive = lay_out(path.name, value)
    create_archives(path, [archive])
    with path.open("r+b") as file:
        file.seek(archive.extents[1].offset)
        file.write(np.array([1, 2], "f4").tobytes())
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["b"].tolist() == [1, 2]
    assert found["a"].numel() == 5 << 30
    assert [entry.offset for entry in (read_torch(path)["a"], read_torch(path)["b"])] == [
        extent.offset for extent in archive.extents[:2]
    ]
    with zipfile.ZipFile(path) as archive_file:
        assert archive_file.getinfo("archive/data/1").file_size == 8
        assert archive_file.getinfo("archive/data/2").header_offset > 5 << 30


def test_a_wrong_checksum_would_be_seen(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    monkeypatch.setattr(pt_writer, "_TILE", 8)
    archive = write(path, {"a": Blank("F32", (9,))}, [np.arange(9, dtype="f4")])
    assert zipfile.ZipFile(path).testzip() is None
    with path.open("r+b") as file:
        file.seek(archive.extents[0].offset)
        file.write(b"\x01")
    assert zipfile.ZipFile(path).testzip() == "archive/data/0"


@pytest.mark.parametrize("size", [0, 1, 3, 256, 1000, 65_537])
def test_checksum_of_zeros(size):
    assert pt_writer.checksum_of_zeros(size) == zlib.crc32(bytes(size))


def test_zeros_need_no_filling(tmp_path):
    archive = write(tmp_path / "file.pt", {"a": Blank("F32", (9,), zeros=True), "b": Blank("F32", (2,))}, [])
    assert len(archive.records) == 1
    assert zipfile.ZipFile(tmp_path / "file.pt").testzip() is None
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert not found["a"].any()
