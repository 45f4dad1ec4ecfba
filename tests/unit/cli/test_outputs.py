"""What ``inherit`` and ``export`` refuse to write over, and options that a format has no place for."""

import pytest

from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint


@pytest.fixture
def teacher(tmp_path):
    return write_checkpoint(tmp_path / "models" / "teacher", llama(), random_arrays(llama()), "hf")


@pytest.mark.parametrize("command", [["inherit", "--layers", "0"], ["export"], ["convert"]])
def test_overwrite_never_costs_the_teacher(teacher, capsys, command):
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    for output in (teacher, teacher.parent):
        (output / "manifest.json").touch()
        assert main([command[0], str(teacher), str(output), *command[1:], "--overwrite"]) == 2
        assert "holds what is read" in capsys.readouterr().err
    (teacher / "manifest.json").unlink()
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before


def test_a_student_can_be_made_again(teacher, tmp_path):
    words = ["inherit", str(teacher), str(tmp_path / "s")]
    assert main([*words, "--layers", "0"]) == 0
    assert main([*words, "--layers", "0,1"]) == 2
    assert main([*words, "--layers", "0,1", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", "2"], "--tp 2 means nothing to the format hf"),
        (["--format", "meta", "--pp", "2"], "--pp 2 means nothing to the format meta"),
        (["--format", "ds_universal", "--tp", "2"], "--tp 2 means nothing to the format ds_universal"),
        (["--dialect", "te"], "--dialect te means nothing to the format hf"),
        (["--vocab-multiple", "64"], "choose --format megatron or torch_dist"),
        (["--format", "meta", "--vocab-multiple", "64"], "--vocab-multiple 64 means nothing to the format meta"),
        (["--format", "megatron", "--max-shard-size", "1GB"], "--max-shard-size 1GB means nothing to the format meg"),
        (["--optimizer", "some"], "keep or drop"),
        (["--format", "safetensors"], "hf, meta, megatron, torch_dist, ds_universal"),
        (["--format", "gguf"], "--format gguf is none that can be written"),
        (["--format", "learngene"], "--format learngene is none that can be written"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(teacher, tmp_path, capsys, options, said):
    for command in (["inherit", "--layers", "0"], ["convert"]):
        assert main([command[0], str(teacher), str(tmp_path / "s"), *command[1:], *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_number_that_no_name_holds_is_refused(teacher, tmp_path, capsys):
    for format in ("hf", "meta"):
        assert main(["convert", str(teacher), str(tmp_path / "s"), "--format", format, "--iteration", "9"]) == 2
        assert f"--iteration 9 means nothing to the format {format}" in capsys.readouterr().err
    assert main(["convert", str(teacher), str(tmp_path / "s"), "--format", "ds_universal", "--iteration", "9"]) == 0
