"""Trackers that name what is not there: a copy that was broken off, or of the tracker alone."""

import shutil

import pytest

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.detect import detect_format, open_source
from tests.support.checkpoints import llama, random_arrays, write_checkpoint


@pytest.mark.parametrize("format", ["megatron", "torch_dist"])
def test_a_missing_iteration_is_named(tmp_path, format):
    write_checkpoint(tmp_path, llama(), random_arrays(llama()), format, iteration=20)
    (tmp_path / "iter_0000020").rename(tmp_path / "iter_0000010")
    with pytest.raises(CheckpointError, match=r"iteration.txt names iter_0000020, which is missing") as refusal:
        open_source(tmp_path)
    assert refusal.value.got == "iter_0000010"
    assert detect_format(str(tmp_path / "iter_0000010")) == format


def test_a_missing_step_of_deepspeed_is_named(tmp_path):
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match="latest names global_step7, which is missing"):
        open_source(tmp_path)
    shutil.rmtree(tmp_path / "global_step5")
    with pytest.raises(CheckpointError) as refusal:
        open_source(tmp_path)
    assert refusal.value.got == "no folder"


def test_an_empty_folder_and_a_file_are_called_that(tmp_path):
    with pytest.raises(CheckpointError, match=r"Got: an empty folder\."):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"Got: a file\..*Give the folder"):
        open_source(tmp_path / "model.safetensors")
