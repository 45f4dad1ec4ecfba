import pytest

from megatron_inherit.data.byte_files import byte_tokenizer_files
from megatron_inherit.data.tokenizer import ByteTokenizer, open_tokenizer

TEXTS = ["def f(x):\n\treturn x\r\n", "Ünïcödé — 你好 🙂", "", "\x00\x7f", "<|endoftext|>"]


@pytest.fixture
def folder(tmp_path):
    for name, content in byte_tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_files_give_the_ids_of_the_byte_tokenizer(folder):
    made, bytes_ = open_tokenizer(folder), ByteTokenizer()
    assert made.encode_batch(TEXTS) == bytes_.encode_batch(TEXTS)
    assert (made.vocab_size, made.eos_id) == (bytes_.vocab_size, bytes_.eos_id)
    assert [made.decode(ids) for ids in bytes_.encode_batch(TEXTS)] == TEXTS
    assert made.byte_lengths().tolist() == bytes_.byte_lengths().tolist()


@pytest.mark.slow
def test_transformers_reads_them(folder):
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    ids = made(TEXTS[1])["input_ids"]
    assert ids == list(TEXTS[1].encode())
    assert made.decode(ids) == TEXTS[1]
    assert made.eos_token_id == 256
