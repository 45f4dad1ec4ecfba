"""A grown student is, tensor by tensor, its trained student and its teacher."""

import json

import numpy as np
import pytest

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.grow import continued, first_blocks, patched
from megatron_inherit.study.arms import make_start
from megatron_inherit.study.grow import make_grown
from tests.support.tiny_hf import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.slow
MAKE = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=sorted(MAKE))
def pair(request, tmp_path):
    """A teacher of six blocks, and a student of two that has other weights."""
    more = {"scale_attn_by_inverse_layer_idx": True} if request.param == "gpt2" else {}
    teacher = MAKE[request.param](tmp_path / "teacher", layers=6, seed=1, **more)
    other = MAKE[request.param](tmp_path / "other", layers=6, seed=2, **more)
    return teacher, make_start(other, tmp_path / "student", layers=[0, 3])


def values(path):
    with open_source(path) as source:
        names = [spec.name for spec in enumerate_tensors(source.config)]
        return {name: source.read(name).array().copy() for name in names}


@pytest.mark.parametrize("mode", ["continue", "patch"])
def test_each_block_comes_from_where_the_round_says(pair, tmp_path, mode):
    teacher, student = pair
    blocks = continued(2, 4) if mode == "continue" else patched(6, 2, 4)
    assert len(blocks) == 4
    stands_for = first_blocks(mode, 6, 2)
    grown = make_grown(student, teacher, tmp_path / "grown", blocks=blocks, stands_for=stands_for)
    own, others, made = values(student), values(teacher), values(grown)
    for name, value in made.items():
        parts = name.split(".")
        if parts[0] == "layers":
            owner, block = blocks[int(parts[1])]
            parts[1] = str(block)
            expected = {"student": own, "teacher": others}[owner][".".join(parts)]
        else:
            expected = own[name]
        assert np.array_equal(value, expected), name
    config = json.loads((grown / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 4
    record = json.loads((grown / "inherit.json").read_text())["grown"]
    assert "of the student" in record["blocks"]
    stamp = (grown / "inherit.json").stat().st_mtime_ns
    make_grown(student, teacher, grown, blocks=blocks, stands_for=stands_for)
    assert (grown / "inherit.json").stat().st_mtime_ns == stamp


def test_patched_whole_it_is_the_teacher(pair, tmp_path):
    teacher, student = pair
    blocks = patched(6, 2, 6)
    grown = make_grown(student, teacher, tmp_path / "grown", blocks=blocks, stands_for=(0, 3))
    expected = values(teacher)
    assert all(np.array_equal(value, expected[name]) for name, value in values(grown).items())


def test_a_student_of_another_teacher_is_refused(tmp_path):
    teacher = tiny_llama(tmp_path / "teacher", layers=4)
    student = tiny_llama(tmp_path / "student", layers=2, vocab_size=300)
    with pytest.raises(CheckpointError, match="more than their number of blocks"):
        make_grown(student, teacher, tmp_path / "grown", blocks=continued(2, 4), stands_for=(0, 1))
