"""The restricted reader: the same structure as torch's, extents that hold the right bytes, and nothing ever run."""

import argparse
import collections
import enum
import io
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.enums import ModelType

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats.pickle_machine import (
    MEMBER,
    Global,
    Hooks,
    Machine,
    Opaque,
    PickleRefusedError,
)
from megatron_inherit.checkpoint.formats.pickle_reader import fields, mapped, read_pickle, read_torch, read_torch_blob
from megatron_inherit.checkpoint.formats.pickle_writer import Pickler

DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "U8": "u1", "BOOL": "u1"}


def elements(extent: Extent) -> np.ndarray:
    raw = Path(extent.file).read_bytes()
    strides = tuple(stride * extent.item_size for stride in extent.strides)
    return np.ndarray(extent.shape, "<" + DTYPES[extent.dtype], raw, extent.offset, strides)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def sample() -> dict:
    torch.manual_seed(0)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    marked = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    marked.tensor_model_parallel = True
    return {
        "whole": base,
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "half": torch.arange(5).half(),
        "marked": marked,
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "module": torch.nn.Linear(3, 2).state_dict(),
        "steps": [torch.tensor([7]), (torch.zeros(2, dtype=torch.uint8), torch.tensor([True]))],
    }


def assert_same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, Extent)
        np.testing.assert_array_equal(elements(found), numpy_of(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("new_container", [True, False])
def test_extents_hold_what_torch_saved(tmp_path, new_container):
    path = tmp_path / "file.pt"
    torch.save(sample(), path, _use_new_zipfile_serialization=new_container)
    assert_same(read_torch(path), sample())


def test_plain_values_and_records(tmp_path):
    value = {
        "args": argparse.Namespace(num_layers=3, dtype=torch.bfloat16, kind=torch.float),
        "numbers": [0, -1, 255, 70000, -70000, 2**40, 1.5, None, True],
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "counter": collections.OrderedDict(a=1),
        "set": {1, 2},
        "python rng": random.Random(0).getstate(),
        "numpy rng": np.random.RandomState(0).get_state(),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    }
    torch.save(value, tmp_path / "file.pt")
    found = read_torch(tmp_path / "file.pt")
    assert fields(found["args"]) == {
        "num_layers": 3,
        "dtype": Global("torch", "bfloat16"),
        "kind": Global("torch", "float32"),
    }
    assert found["numbers"] == value["numbers"]
    assert found["size"] == (2, 3)
    assert found["device"] == "cpu"
    assert found["counter"] == {"a": 1}
    assert found["set"] == {1, 2}
    assert found["python rng"] == value["python rng"]
    assert isinstance(found["numpy rng"][1], Opaque)
    assert found["optimizer"]["param_groups"][0]["lr"] == value["optimizer"]["param_groups"][0]["lr"]


@pytest.fixture(params=["by value", "by name"])
def enumerations(request, monkeypatch):
    """Lets members of enumerations be pickled by their value, as by Python 3.12, or by their name, as by 3.11.2."""
    reduce = {
        "by value": lambda self, protocol: (type(self), (self._value_,)),
        "by name": lambda self, protocol: (getattr, (type(self), self._name_)),
    }[request.param]
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", reduce)
    return request.param


def test_members_of_enumerations_are_records(tmp_path, enumerations):
    torch.save({"kind": ModelType.encoder_or_decoder}, tmp_path / "file.pt")
    found = read_torch(tmp_path / "file.pt")["kind"]
    named = Global("megatron.core.enums", "ModelType")
    if enumerations == "by value":
        assert (found.kind, found.args) == (named, (ModelType.encoder_or_decoder.value,))
    else:
        assert (found.kind, found.args) == (MEMBER, (named, "encoder_or_decoder"))
    assert pickle.loads(Pickler().dumps({"kind": found}))["kind"] is ModelType.encoder_or_decoder


@pytest.mark.usefixtures("enumerations")
def test_blobs_and_metadata_of_a_distributed_checkpoint(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).bfloat16(), "bytes": [None]}
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=True, thread_count=1)
    dcp.save(state, storage_writer=writer, no_dist=True)
    metadata = fields(read_pickle(tmp_path / ".metadata"))
    for index, info in metadata["storage_data"].items():
        where = fields(info)
        path = tmp_path / where["relative_path"]
        with mapped(path) as data:
            found = read_torch_blob(data, path, start=where["offset"], length=where["length"])
        assert_same(found, state[fields(index)["fqn"]])
    assert fields(metadata["state_dict_metadata"]["a"])["size"] == (2, 3)


class Evil:
    """Runs a command when a real unpickler reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("container", ["zip", "stream", "pickle", "ascii"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, container):
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    if container in ("zip", "stream"):
        torch.save({"w": torch.ones(2), "x": Evil(marker)}, path, _use_new_zipfile_serialization=container == "zip")
        read = read_torch
    else:
        path.write_bytes(pickle.dumps({"x": Evil(marker)}, protocol=0 if container == "ascii" else 4))
        read = read_pickle
    with pytest.raises(CheckpointError) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert ("opcode" if container == "ascii" else "system") in str(refusal.value)
    assert refusal.value.exit_code == 5
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.setattr", "os.system", "subprocess.Popen", "torch.load", "torch.hub.load"]
)
def test_names_off_the_list_are_refused(name):
    module, _, function = name.rpartition(".")
    program = b"\x80\x02c" + module.encode() + b"\n" + function.encode() + b"\n."
    from megatron_inherit.checkpoint.formats import pickle_reader

    with pytest.raises(PickleRefusedError, match=name):
        Machine(program, Hooks(pickle_reader._allowed)).run()


@pytest.mark.parametrize(
    "attribute",
    [
        b"cos\nsystem\nX\x01\x00\x00\x00a\x86R",  # of what may not be named
        b"K\x01X\x01\x00\x00\x00a\x86R",  # of a number
        b"cmegatron.core.enums\nModelType\nX\x03\x00\x00\x00a.b\x86R",
        b"cmegatron.core.enums\nModelType\nX\x01\x00\x00\x00a\x86R)R",  # called
    ],
)
def test_attributes_are_taken_of_named_classes_and_never_called(attribute):
    from megatron_inherit.checkpoint.formats import pickle_reader

    with pytest.raises(PickleRefusedError):
        Machine(b"\x80\x02cbuiltins\ngetattr\n" + attribute + b".", Hooks(pickle_reader._allowed)).run()


def test_allowed_names_stay_inert():
    program = b"\x80\x02cmegatron.core.enums\nModelType\nK\x01\x85R."
    found = Machine(program, Hooks(lambda _: True)).run()
    assert found == found
    assert (str(found.kind), found.args) == ("megatron.core.enums.ModelType", (1,))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02u.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02]K\x01\x85R.",
        b"\x80\x02]}q\x00s.",
        b"(S'touch x'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"",
    ],
)
def test_damaged_programs_are_refused(tmp_path, program):
    path = tmp_path / ".metadata"
    path.write_bytes(program)
    with pytest.raises(CheckpointError, match="metadata"):
        read_pickle(path)


def test_bombs_are_refused_at_once(tmp_path):
    memo = b"\x80\x02N" + b"r" + struct.pack("<I", 0xFFFFFFFF) + b"."
    (tmp_path / "memo").write_bytes(memo)
    assert read_pickle(tmp_path / "memo") is None
    (tmp_path / "stack").write_bytes(b"\x80\x02" + b"]" * (2 << 20) + b".")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(20 << 20))
    started = time.process_time()
    with pytest.raises(CheckpointError, match="nests or lists"):
        read_pickle(tmp_path / "stack")
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch(tmp_path / "bomb.pt")
    assert time.process_time() - started < 2


def saved(value) -> bytearray:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize("keep", [0, 3, 30, 200, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    data = saved({"w": torch.ones(400)})
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        read_torch(path)


def test_every_flipped_byte_of_the_directory_is_harmless(tmp_path):
    data = saved({"w": torch.ones(4)})
    path = tmp_path / "flip.pt"
    for position in range(data.rfind(b"PK\x01\x02") - 300, len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            found = read_torch(path)
        except CheckpointError:
            continue
        extent = found["w"]
        assert 0 <= extent.offset <= extent.end <= len(data)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    data = saved({"w": torch.ones(2, 2)})
    at = data.find(b"K\x02K\x02\x86")
    data[at + 1] = 200
    path = tmp_path / "wide.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_torch(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt is missing"):
        read_torch(tmp_path / "none.pt")
