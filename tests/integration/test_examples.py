"""The examples a user runs: the dry runs print every command, the smoke runs carry all of them out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ("inheritune_llama2_7b_50B.sh", "inheritune_openllama3b_1B.sh")


def run_example(name, *options, **environ):
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    return subprocess.run(["bash", f"examples/{name}", *options], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", CLUSTER)
def test_a_dry_run_prints_every_command_and_writes_nothing(name, tmp_path):
    done = run_example(name, "--dry-run", WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    for command in (
        "data ingest",
        "data tokenize",
        "data subset",
        "data windows",
        "inherit ",
        "launch slurm",
        "export",
    ):
        assert f"$ minherit {command}" in done.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", CLUSTER)
def test_a_missing_teacher_is_said_before_anything_runs(name, tmp_path):
    done = run_example(name, TEACHER=str(tmp_path / "none"), WORK=str(tmp_path / "work"))
    assert done.returncode == 5
    assert "set TEACHER" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTER)
def test_a_smoke_run_ends_with_a_student_and_a_page(name, tmp_path):
    done = run_example(name, "--smoke", SMOKE_WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "work" / "student-trained" / "model.safetensors").exists()
    assert "lambada_openai" in (tmp_path / "work" / "report.html").read_text()
