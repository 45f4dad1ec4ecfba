"""The commands that make a run again: as many processes, and a folder that is another one."""

from pathlib import Path

import pytest

from megatron_inherit.eval.rerun import commands_of_folders, commands_of_run, studies_in
from megatron_inherit.eval.runs import Run

SHAPES = {
    1: ("minherit train ", "--nodes 1 --gpus-per-node 1 "),
    2: ("torchrun --standalone --nproc-per-node=2 -m megatron_inherit train ", "--nodes 1 --gpus-per-node 2 "),
    12: ("minherit launch torchrun ", "--nodes 2 --gpus-per-node 6 "),
    512: ("minherit launch torchrun ", "--nodes 64 --gpus-per-node 8 "),
}


@pytest.mark.parametrize("world", SHAPES)
def test_a_run_is_made_again_by_as_many_processes(world):
    run = Run(
        Path("a b"), "label", environment={"world_size": world, "date": "today", "command": "/x/minherit train r"}
    )
    made, again, cluster = commands_of_run(run)
    start, shape = SHAPES[world]
    assert made == "today  minherit train r"
    assert again.startswith(f"{start}'a b/run.yaml' run.output='a b-again'")
    assert cluster == f"minherit launch slurm 'a b/run.yaml' {shape}--output 'a b-slurm'"
    assert (shape.strip() in again) == (world > 8)


def test_the_folder_one_stands_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "growth" / "inner").mkdir(parents=True)
    (tmp_path / "growth" / "grow.json").write_text("{}")
    for here, path in ((tmp_path / "growth", "."), (tmp_path / "growth" / "inner", "..")):
        monkeypatch.chdir(here)
        ((name, command),) = commands_of_folders([Path(path)])
        assert name == "growth growth"
        assert command == f"minherit grow {Path(path, 'grow.yaml')} run.output={tmp_path}/growth-again"


def test_a_folder_that_ends_like_a_file_is_no_study(tmp_path):
    (tmp_path / "old.yaml").mkdir()
    assert studies_in(tmp_path) == []
