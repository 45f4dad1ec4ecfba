"""Tokenizers: one protocol over Hugging Face files, SentencePiece models, GPT-2's vocabulary files and plain bytes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from megatron_inherit.base.errors import DataError, MinheritError
from megatron_inherit.base.optional import require
from megatron_inherit.data.text_parts import encode_in_parts, huggingface_may_cut, sentencepiece_may_cut

if TYPE_CHECKING:
    from megatron_inherit.data.manifests import TokenizerRecord

_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        kind: ``hf``, ``sentencepiece``, ``gpt2`` or ``bytes``.
        vocab_size: Highest id plus one.
        eos_id, bos_id: The ids that end and begin a document, None where the vocabulary has none.
        fingerprint: Hash of the vocabulary files and of the two ids.
        path: What :func:`open_tokenizer` was given.
    """

    kind: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    fingerprint: str
    path: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the ids of each text; no BOS or EOS is added and text never turns into a control token."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids, control tokens included as they are written."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Gives the UTF-8 bytes of text that each id stands for, int64 [vocab_size]; control tokens count 0."""
        ...


def open_tokenizer(path: str | Path, *, eos: str | None = None, bos: str | None = None) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        path: ``bytes``; a ``tokenizer.json``; a SentencePiece ``.model``; or a folder holding one of these, or GPT-2's
            ``vocab.json`` and ``merges.txt`` (``encoder.json`` and ``vocab.bpe``).
        eos: The token (as written in the vocabulary) that ends a document; default: what the folder's configuration
            says, else the usual names.
        bos: The token that begins one; the same default.

    Raises:
        DataError: Nothing readable is there, or the vocabulary lacks ``eos`` or ``bos``.
    """
    if str(path) == "bytes":
        if eos or bos:
            raise DataError("The tokenizer of bytes has no token by a name.", got=eos or bos, fix="Leave it out.")
        return ByteTokenizer()
    path = Path(path)
    file = _vocabulary_file(path)
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file, eos=eos, bos=bos)
        return HuggingFaceTokenizer(file, eos=eos, bos=bos)
    except MinheritError:
        raise
    except Exception as error:
        raise DataError(f"The tokenizer {file} cannot be read: {error}.") from error


def _vocabulary_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = ("tokenizer.json", "tokenizer.model", *(vocabulary for vocabulary, _ in _GPT2_FILES))
    for name in names:
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"No tokenizer at {path}.",
        expected=f"'bytes', a file tokenizer.json or *.model, or a folder with one of {', '.join(names)}",
        fix="For a name on the Hugging Face hub: hf download NAME --include 'tokenizer*' --local-dir FOLDER.",
    )


class ByteTokenizer:
    """Every byte of UTF-8 is a token; id 256 ends a document."""

    kind, path = "bytes", "bytes"
    vocab_size = 257
    eos_id: int | None = 256
    bos_id: int | None = None
    fingerprint = "bytes-257"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Gives the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Joins bytes to text; what is not UTF-8 shows as a replacement character."""
        return bytes(int(one) for one in ids if 0 <= one < 256).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """One byte an id, none for the end of a document."""
        return np.array([1] * 256 + [0], np.int64)


class SentencePieceTokenizer:
    """A SentencePiece model, such as LLaMA's ``tokenizer.model``."""

    kind = "sentencepiece"

    def __init__(self, file: Path, *, eos: str | None, bos: str | None) -> None:
        module = require("sentencepiece", "SentencePiece models")
        self._model = module.SentencePieceProcessor(model_file=str(file))
        self.path = str(file)
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._named(eos) if eos else _or_none(self._model.eos_id())
        self.bos_id = self._named(bos) if bos else _or_none(self._model.bos_id())
        self.fingerprint = _fingerprint([file], self.eos_id, self.bos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes on the calling thread, in parts where that changes no id."""
        encode = functools.partial(self._model.encode, num_threads=1)
        return encode_in_parts(encode, texts) if self._may_cut else encode(list(texts))

    @functools.cached_property
    def _may_cut(self) -> bool:
        return sentencepiece_may_cut(self._model)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes; control tokens give no text."""
        return self._model.decode([int(one) for one in ids])

    def _named(self, piece: str) -> int:
        number = self._model.piece_to_id(piece)
        if self._model.id_to_piece(number) != piece:
            raise DataError(f"The vocabulary of {self.path} has no token {piece!r}.")
        return number

    def control_pieces(self) -> list[str]:
        """Names the control tokens."""
        return [self._model.id_to_piece(one) for one in range(self.vocab_size) if self._model.is_control(one)]

    def byte_lengths(self) -> np.ndarray:
        """Counts the bytes of the pieces, the blank mark as one."""
        out = np.zeros(self.vocab_size, np.int64)
        for number in range(self.vocab_size):
            if self._model.is_byte(number):
                out[number] = 1
            elif not (self._model.is_control(number) or self._model.is_unknown(number)):
                out[number] = len(self._model.id_to_piece(number).replace("▁", " ").encode())
        return out


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library, or GPT-2's two vocabulary files."""

    def __init__(self, file: Path, *, eos: str | None, bos: str | None) -> None:
        module = require("tokenizers", "Hugging Face tokenizers")
        self.path = str(file)
        merges = dict(_GPT2_FILES).get(file.name)
        self.kind = "gpt2" if merges else "hf"
        self._tokenizer = (
            _gpt2(module, file, file.with_name(merges)) if merges else module.Tokenizer.from_file(str(file))
        )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        declared = _declared_specials(file.parent)
        self.eos_id = _find(vocabulary, eos, declared.get("eos_token"), _USUAL_EOS, file)
        self.bos_id = _find(vocabulary, bos, declared.get("bos_token"), _USUAL_BOS, file)
        self.fingerprint = _fingerprint([file, *([file.with_name(merges)] if merges else [])], self.eos_id, self.bos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes on the library's threads (``TOKENIZERS_PARALLELISM``), in parts where that changes no id."""
        return encode_in_parts(self._encode, texts) if self._may_cut else self._encode(list(texts))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def _may_cut(self) -> bool:
        return huggingface_may_cut(self._tokenizer)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes, control tokens as they are written."""
        return self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Gives the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def byte_lengths(self) -> np.ndarray:
        """Counts the bytes of the pieces as the decoder of the file writes them."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        out = np.zeros(self.vocab_size, np.int64)
        for piece, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in added:
                out[number] = 0 if added[number].special else len(piece.encode())
            elif byte_level:
                out[number] = len(piece)
            else:
                out[number] = 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())
        for end in (self.eos_id, self.bos_id):
            if end is not None:
                out[end] = 0
        return out


def _gpt2(module: Any, vocabulary: Path, merges: Path) -> Any:
    if not merges.is_file():
        raise DataError(f"{merges} is missing beside {vocabulary.name}.")
    model = module.models.BPE.from_file(str(vocabulary), str(merges))
    tokenizer = module.Tokenizer(model)
    tokenizer.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = module.decoders.ByteLevel()
    return tokenizer


def _declared_specials(folder: Path) -> dict[str, str]:
    """Reads ``eos_token`` and ``bos_token`` of the configuration beside a tokenizer.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}.") from error
        for key in ("eos_token", "bos_token"):
            value = values.get(key) if isinstance(values, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def _find(
    vocabulary: dict[str, int], asked: str | None, declared: str | None, usual: tuple[str, ...], file: Path
) -> int | None:
    if asked or declared:
        return _named(vocabulary, asked or declared or "", file)
    return next((vocabulary[name] for name in usual if name in vocabulary), None)


def _named(vocabulary: dict[str, int], name: str, file: Path) -> int:
    if name not in vocabulary:
        raise DataError(f"The vocabulary of {file} has no token {name!r}.")
    return vocabulary[name]


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _fingerprint(files: Sequence[Path], *ids: int | None) -> str:
    return _hash([file.read_bytes() for file in files], *ids)


def _hash(contents: Sequence[bytes], *ids: int | None) -> str:
    digest = xxhash.xxh3_128(repr(ids).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def made_the_ids(record: TokenizerRecord, files: Mapping[str, bytes]) -> bool | None:
    """Tells whether vocabulary files are those that made token ids.

    Args:
        record: What the tokens' manifest says of their tokenizer.
        files: Names and contents of the files beside a model.

    Returns:
        None where no file is of the kind that made the ids, so that nothing can be compared.
    """
    forms = {
        "hf": (("tokenizer.json",),),
        "sentencepiece": (("tokenizer.model",),),
        "gpt2": _GPT2_FILES,
    }.get(record.kind, ())
    hashes = {
        _hash([files[name] for name in names], record.eos_id, record.bos_id)
        for names in forms
        if all(name in files for name in names)
    }
    return record.fingerprint in hashes if hashes else None


def flatten(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lays lists of ids end to end: ids int32 and lengths int64."""
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths
