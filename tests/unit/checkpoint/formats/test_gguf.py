"""GGUF files that the ``gguf`` library wrote: values, row orders, configuration, tokenizer, damage."""

import json

import numpy as np
import pytest

from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, read_arrays

gguf = pytest.importorskip("gguf")

CONFIG = llama(hidden_size=64, head_dim=8, ffn_size=96, tied=True, num_layers=2, vocab_size=268)
NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def physical_name(name):
    stem, _, end = name.rpartition(".")
    parts = stem.split(".", 2)
    return f"{NAMES[parts[0]]}.{end}" if parts[0] != "layers" else f"blk.{parts[1]}.{NAMES[parts[2]]}.{end}"


def interleave(values, heads):
    """llama.cpp's order of the query and key rows."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, arrays, *, kind="Q4_1", arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_license("apache-2.0")
    add_tokenizer(writer)
    quantised = {}
    for name, values in arrays.items():
        stored = values
        if arch == "llama" and name.endswith(("attn.q.weight", "attn.k.weight")):
            stored = interleave(values, 8 if "attn.q" in name else 2)
        if values.ndim == 2 and kind != "F32":
            type_ = gguf.GGMLQuantizationType[kind]
            packed = gguf.quantize(stored, type_)
            quantised[name] = gguf.dequantize(packed, type_)
            writer.add_tensor(physical_name(name), packed, raw_dtype=type_)
        else:
            quantised[name] = stored
            writer.add_tensor(physical_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantised


def add_tokenizer(writer):
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["he", "ll", "hell", "hello", "Ġw", "or", "Ġwor", "ld", "Ġworld"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(CONFIG)


def undo(name, values, arch="llama"):
    if arch != "llama" or not name.endswith(("attn.q.weight", "attn.k.weight")):
        return values
    heads = 8 if "attn.q" in name else 2
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32"])
def test_tensors_are_the_librarys_in_our_row_order(tmp_path, arrays, kind):
    stored = write(tmp_path / "m.gguf", arrays, kind=kind)
    with open_source(tmp_path / "m.gguf") as source:
        assert source.config == CONFIG
        found = read_arrays(source)
        part = source.read("layers.1.attn.k.weight", (slice(3, 9), slice(10, 20))).array()
    assert list(found) == list(arrays)
    for name, values in found.items():
        assert np.array_equal(values, undo(name, stored[name])), name
    assert np.array_equal(part, found["layers.1.attn.k.weight"][3:9, 10:20])
    if kind == "F32":
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_a_student_of_a_quantised_teacher(tmp_path, arrays, capsys):
    write(tmp_path / "Tiny-Instruct.Q4_1.gguf", arrays)
    words = ["inherit", str(tmp_path / "Tiny-Instruct.Q4_1.gguf"), str(tmp_path / "s"), "--layers", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert "dequantise type Q4_1" in capsys.readouterr().out
    assert main(words) == 0
    assert "Tiny-Instruct, dequantised from Q4_1" in (tmp_path / "s" / "README.md").read_text()
    assert "license: apache-2.0" in (tmp_path / "s" / "README.md").read_text()
    with open_source(tmp_path / "Tiny-Instruct.Q4_1.gguf") as teacher, open_source(tmp_path / "s") as student:
        wanted = teacher.read("layers.1.mlp.down.weight").array()
        assert np.array_equal(student.read("layers.0.mlp.down.weight").array(), wanted)
    assert main(["convert", str(tmp_path / "s"), str(tmp_path / "again")]) == 0
    assert "Tiny-Instruct, dequantised from Q4_1" in (tmp_path / "again" / "README.md").read_text()


def test_tokenizer_files(tmp_path, arrays):
    from tokenizers import Tokenizer

    write(tmp_path / "m.gguf", arrays)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "hf")]) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>hello world 12<|im_end|>")
    assert encoded.tokens[:3] == ["<|im_start|>", "hello", "Ġworld"]
    assert encoded.tokens[-3:] == ["1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>hello world 12<|im_end|>"
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["model_max_length"]) == ("<|im_end|>", 64)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 2


def test_qwen_rows_are_not_permuted(tmp_path, arrays):
    stored = write(tmp_path / "m.gguf", arrays | biases(), kind="F32", arch="qwen2")
    with open_source(tmp_path / "m.gguf") as source:
        assert source.config.family == "qwen2"
        assert source.config.qkv_bias
        for name in ("layers.1.attn.q.weight", "layers.0.attn.k.bias"):
            assert np.array_equal(source.read(name).array(), stored[name])


def biases():
    sizes = {"q": 64, "k": 16, "v": 16}
    return {
        f"layers.{layer}.attn.{part}.bias": np.full(size, layer + 1, np.float32)
        for layer in range(2)
        for part, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"GGML" + data[4:], "no GGUF file"),
        (lambda data: data[:4] + b"\x09" + data[5:], "no GGUF file of version 2 or 3"),
        (lambda data: data[:100], "truncated"),
        (lambda data: data[:-50], "truncated"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "impossible counts"),
        (lambda data: data[:24] + b"\xff" * 7 + b"\x00" + data[32:], "truncated or its metadata is damaged"),
        (lambda data: data.replace(b"blk.1.ffn_down", b"blk.1.ffn_dawn"), "blk.1.ffn_down.weight"),
        (lambda data: data.replace(b"llama", b"gemma"), "unknown architecture"),
    ],
)
def test_damaged_files(tmp_path, arrays, capsys, damage, words):
    write(tmp_path / "m.gguf", arrays)
    (tmp_path / "m.gguf").write_bytes(damage((tmp_path / "m.gguf").read_bytes()))
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 5
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
