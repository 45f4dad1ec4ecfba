"""Damage that `minherit train` must see before the first step: exit code 4, the file and the offset."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.cli.main import main
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.data.manifests import SubsetOptions
from tests.support.tiny_run import VOCABULARY, recipe, status, write_corpus

pytestmark = pytest.mark.slow
Place = tuple[Path, int, int]
"""The damaged file, and the offset that is named: of a bare prefix, whose index is read, and of a subset, whose files
have sizes and hashes of blocks."""


def truncate(corpus: Path, subset: Path) -> Place:
    file = corpus / "corpus.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-6])
    return file, len(data) - 6, len(data) - 6


def move_a_document(corpus: Path, subset: Path) -> Place:
    """Sequence 5 begins two bytes later than sequence 4 ends."""
    file = corpus / "corpus.idx"
    data = bytearray(file.read_bytes())
    place = 34 + 4 * len(IndexedFile(corpus / "corpus")) + 8 * 5
    data[place] += 2
    file.write_bytes(data)
    return file, place, 0


def cut_the_index(corpus: Path, subset: Path) -> Place:
    file = corpus / "corpus.idx"
    file.write_bytes(file.read_bytes()[:-8])
    return file, 18, file.stat().st_size


def change_a_token(corpus: Path, subset: Path) -> Place:
    file = corpus / "corpus.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    return file, 0, 0


def change_the_subset(corpus: Path, subset: Path) -> Place:
    file = subset / "train.starts"
    data = bytearray(file.read_bytes())
    data[8] ^= 1
    file.write_bytes(data)
    return file, 0, 0


def draw_a_foreign_id(corpus: Path, subset: Path) -> Place:
    file = corpus / "corpus.bin"
    tokens = np.fromfile(file, "<u2")
    tokens[321] = VOCABULARY
    tokens.tofile(file)
    make_subset([str(corpus / "corpus")], subset, SubsetOptions(valid_share=0, test_share=0), overwrite=True)
    return file, 2 * 321, 2 * 321


CASES = {
    "prefix": (truncate, move_a_document, cut_the_index, draw_a_foreign_id),
    "subset": (truncate, move_a_document, cut_the_index, draw_a_foreign_id, change_a_token, change_the_subset),
}


@pytest.mark.parametrize(("kind", "damage"), [(kind, case) for kind, cases in CASES.items() for case in cases])
def test_damage_is_found_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, damage: Callable[[Path, Path], Place]
) -> None:
    corpus, subset = write_corpus(tmp_path / "corpus"), tmp_path / "subset"
    make_subset([str(corpus / "corpus")], subset, SubsetOptions(valid_share=0, test_share=0))
    file, at_prefix, at_subset = damage(corpus, subset)
    data = {"path": str(subset), "split": "train"} if kind == "subset" else {}
    shape = {"preset": "llama-tiny", "init": "random"}
    sizes = {"num_layers": 1, "hidden_size": 32, "head_dim": 8, "ffn_size": 64, "vocab_size": VOCABULARY}
    assert main(["train", recipe(tmp_path, corpus, data=data, model={**shape, "shape": sizes})]) == 4
    shown = capsys.readouterr().err.replace(f"{subset}/../", f"{tmp_path}/")
    assert str(file) in shown
    assert re.search(rf"offset {at_subset if kind == 'subset' else at_prefix}\b", shown), shown
    assert "Traceback" not in shown
    assert status(tmp_path / "run")["exit_code"] == 4
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
