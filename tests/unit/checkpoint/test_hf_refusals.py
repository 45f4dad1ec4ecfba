"""Damaged and hostile Hugging Face folders: one clear message, exit code 5, nothing written, quickly."""

import dataclasses
import json
import struct
import subprocess
import sys

import pytest

from megatron_inherit.arch.presets import PRESETS
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.detect import format_module, open_source
from megatron_inherit.checkpoint.formats.safetensors_file import MAX_HEADER
from megatron_inherit.checkpoint.stream import SinkOptions
from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint

CONFIG = llama()


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "teacher", CONFIG, random_arrays(CONFIG), "hf")


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "teacher", CONFIG, random_arrays(CONFIG), "hf", max_shard_bytes=30_000)


def refuse(path, tmp_path, capsys, *words):
    """The command fails with exit code 5 and the words, and leaves no output."""
    assert main(["inherit", str(path), str(tmp_path / "student"), "--layers", "first:2"]) == 5
    message = capsys.readouterr().err
    for word in words:
        assert word in message, message
    assert "Traceback" not in message
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith("student")]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_header(path, change):
    """Rewrites the JSON header of a safetensors file; data and sizes stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_missing_path(tmp_path, capsys):
    refuse(tmp_path / "nothing", tmp_path, capsys, "does not exist")


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    refuse(tmp_path / "teacher", tmp_path, capsys, "no checkpoint of a known format")


def test_missing_shard(sharded, tmp_path, capsys):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(sharded, tmp_path, capsys, f"{shard.name} is missing", "again")


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_file(folder, tmp_path, capsys, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refuse(folder, tmp_path, capsys, "model.safetensors")


def test_bytes_behind_the_end(folder, tmp_path, capsys):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refuse(folder, tmp_path, capsys, "bytes behind its last tensor")


@pytest.mark.parametrize("length", [1 << 60, 10_000_001])
def test_header_too_large(folder, tmp_path, capsys, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refuse(folder, tmp_path, capsys, "header is too large")


def test_the_largest_llama_in_one_file_is_far_from_the_limit():
    config = dataclasses.replace(PRESETS["llama-2-70b"], num_layers=126)
    names = [spec.name for spec in enumerate_tensors(config)]
    sink = format_module("hf").make_sink(config, dict.fromkeys(names, "BF16"), SinkOptions(max_shard_bytes=1 << 60))
    assert len(sink.sizes) == 1
    assert len(names) == 126 * 9 + 3
    assert sink.total_bytes - sum(stored.nbytes for stored in sink.tensors.values()) < MAX_HEADER / 50


def test_header_longer_than_the_file(folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 9_000_000) + path.read_bytes()[8:])
    refuse(folder, tmp_path, capsys, "its header does not fit")


def overlap(header):
    a, b = header["model.norm.weight"], header["lm_head.weight"]
    shift = 64
    b["data_offsets"] = [offset - shift for offset in b["data_offsets"]]
    assert a["data_offsets"][1] > b["data_offsets"][0]


def hole(header):
    for name in ("lm_head.weight",):
        header[name]["data_offsets"] = [offset + 64 for offset in header[name]["data_offsets"]]


def negative(header):
    header["lm_head.weight"]["data_offsets"][0] = -4


def huge(header):
    header["lm_head.weight"] |= {"shape": [1 << 62, 1 << 62]}


def wrong_size(header):
    header["lm_head.weight"]["shape"] = [130, 31]


def wrong_shape(header):
    header["lm_head.weight"]["shape"] = [32, 130]


def unknown_dtype(header):
    header["lm_head.weight"]["dtype"] = "F9"


def eight_bits(header):
    entry = header["lm_head.weight"]
    entry |= {"dtype": "F8_E4M3", "shape": [130, 128]}


def renamed(header):
    header["lm_haed.weight"] = header.pop("lm_head.weight")


def unknown(header):
    end = header["lm_head.weight"]["data_offsets"][1]
    header["score.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}


def no_object(_):
    return [1, 2]


def incomplete(header):
    del header["lm_head.weight"]["dtype"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overlap, ["lm_head.weight overlaps"]),
        (hole, ["hole", "lm_head.weight"]),
        (negative, ["lm_head.weight", "bad shape or bad offsets"]),
        (huge, ["lm_head.weight"]),
        (wrong_size, ["lm_head.weight", "do not fit its shape"]),
        (wrong_shape, ["lm_head.weight", "wrong shape", "[130, 32]"]),
        (unknown_dtype, ["lm_head.weight", "unknown dtype"]),
        (eight_bits, ["lm_head.weight"]),
        (renamed, ["lm_head.weight is missing"]),
        (unknown, ["score.weight", "has no place"]),
        (no_object, ["not a JSON object"]),
        (incomplete, ["lm_head.weight", "incomplete"]),
    ],
)
def test_damaged_header(folder, tmp_path, capsys, change, words):
    edit_header(folder / "model.safetensors", change)
    refuse(folder, tmp_path, capsys, *words)


def test_a_name_that_stands_twice(folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()[:-1] + b',"lm_head.weight":{}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refuse(folder, tmp_path, capsys, "stands twice")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7, "x.py", ""])
def test_index_that_leads_out_of_the_folder(sharded, tmp_path, capsys, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refuse(sharded, tmp_path, capsys, "model.norm.weight", "no plain name")


def test_index_that_names_the_wrong_shard(sharded, tmp_path, capsys):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    refuse(sharded, tmp_path, capsys, "model.norm.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, ["unknown model family", "bert", "llama"]),
        ({"model_type": "mixtral", "num_local_experts": 8}, ["unknown model family", "Mixture"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised"]),
        ({"hidden_act": "gelu"}, ["not SiLU"]),
        ({"num_hidden_layers": 5}, ["model.layers.4", "missing"]),
        ({"num_hidden_layers": 3}, ["model.layers.3", "has no place"]),
        ({"vocab_size": 128}, ["embed_tokens", "wrong shape"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["config.json"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"num_key_value_heads": 3}, ["not a multiple"]),
        ({"hidden_size": "many"}, ["config.json"]),
    ],
)
def test_config_that_does_not_fit(folder, tmp_path, capsys, changes, words):
    edit_config(folder, **changes)
    refuse(folder, tmp_path, capsys, *words)


def test_config_that_is_no_json(folder, tmp_path, capsys):
    (folder / "config.json").write_text("{" * 100_000)
    refuse(folder, tmp_path, capsys, "config.json is not valid JSON")


def test_untied_model_without_a_head_names_the_field(folder, tmp_path, capsys):
    tied = write_checkpoint(tmp_path / "tied", llama(tied=True), random_arrays(llama(tied=True)), "hf")
    edit_config(tied, tie_word_embeddings=False)
    refuse(tied, tmp_path, capsys, "lm_head.weight", "tie_word_embeddings")


def test_usage_errors(folder, tmp_path, capsys):
    student = str(tmp_path / "student")
    for words in (
        ["--layers", "first:9"],
        ["--layers", "first:0"],
        ["--layers", "x"],
        [],
        ["--layers", "0", "--dtype", "int8"],
    ):
        assert main(["inherit", str(folder), student, *words]) == 2
        assert capsys.readouterr().err.startswith("minherit: ")
    assert main(["inherit", "llama-tiny", student, "--layers", "all"]) == 2
    assert main(["convert", str(folder), student, "--format", "onnx"]) == 2
    assert main(["convert", str(folder), student, "--format", "gguf"]) == 2
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine").touch()
    assert main(["inherit", str(folder), student, "--layers", "0"]) == 2
    assert [entry.name for entry in (tmp_path / "student").iterdir()] == ["mine"]


def test_a_pickle_is_never_run(tmp_path, capsys):
    import pickle
    import zipfile

    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = write_checkpoint(tmp_path / "teacher", CONFIG, random_arrays(CONFIG), "hf")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"lm_head.weight": Evil()}))
        archive.writestr("archive/version", "3")
    refuse(folder, tmp_path, capsys)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested", "many"])
def test_hostile_headers_cost_neither_time_nor_memory(folder, kind):
    path = folder / "model.safetensors"
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    many = b"".join(entry % number for number in range(160_000))
    text = b'{"a":' + b"[" * 9_900_000 if kind == "nested" else b"{" + many[:-1] + b"}"
    assert len(text) < 10_000_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    code = (
        "import json, re, resource\n"
        "from megatron_inherit.cli.main import main\n"
        f"status = main(['inspect', {str(folder)!r}])\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([status, usage.ru_utime + usage.ru_stime, peak]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    status, seconds, peak_kib = json.loads(done.stdout)
    assert status == 5
    assert seconds < 10
    assert peak_kib < 500_000  # VmHWM: ru_maxrss of a child keeps what its parent held when it forked


def test_reading_a_shrunken_file_says_so(folder):
    with open_source(folder) as source:
        source.read("head.weight")
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="truncated"):
            source.read("head.weight")
