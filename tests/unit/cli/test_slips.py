"""Slips of the hand that used to come to light late: on the nodes, in torch, or not at all."""

import pytest

from megatron_inherit.cli.main import main
from megatron_inherit.eval.hf_folder import chosen_device

RECIPE = "tiny-llama-cpu"


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "deepspeed"])
def test_a_job_is_not_printed_for_a_recipe_that_cannot_start(capsys, launcher):
    assert main(["launch", launcher, RECIPE, "--gpus-per-node", "2"]) == 0
    capsys.readouterr()
    for words in (["tiny-lama-cpu"], [RECIPE, "model.pth=student"]):
        assert main(["launch", launcher, *words]) == 3
        captured = capsys.readouterr()
        assert "Nearest" in captured.err
        assert captured.out == ""


def test_a_device_that_is_not_there_is_a_slip(tmp_path, capsys):
    assert chosen_device("cpu") == "cpu"
    assert main(["generate", str(tmp_path), "x", "--device", "cdua"]) == 2
    assert "--device cdua cannot be used" in capsys.readouterr().err


def test_several_continuations_want_sampling(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "x", "--count", "2"]) == 2
    assert "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "said"),
    [("llama-tinny", "preset"), ("meta-llama/Llama-2-7b-hf", "hf://meta-llama/Llama-2-7b-hf"), ("/no/such", "path")],
)
def test_a_teacher_that_is_not_there_is_guessed(tmp_path, monkeypatch, capsys, teacher, said):
    monkeypatch.chdir(tmp_path)
    assert main(["inherit", teacher, "student", "--layers", "first:2"]) == 5
    assert said in capsys.readouterr().err
