"""The sbatch script, run for real under stand-ins for srun and scontrol that do what SLURM documents."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.cli.main import main
from megatron_inherit.launch.slurm import SlurmJob, render_sbatch, submit

SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do echo "$1" >>"$CALLS/srun"; shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_ID=0
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in show) echo node-a; echo node-b ;; *) echo "$@" >>"$CALLS/scontrol" ;; esac
"""
RUN = """#!{python}
import json, os, signal, sys, time
output = sys.argv[-1].removeprefix("run.output=")
open(os.environ["CALLS"] + "/argv", "a").write(" ".join(sys.argv[1:]) + chr(10))
def end(code):
    json.dump({{"exit_code": code}}, open(output + "/exit_status.json", "w"))
    sys.exit(code)
code = os.environ["CODE"]
if code == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
def save(number, frame):
    if code == "slow" and number == signal.SIGUSR1:
        open(os.environ["CALLS"] + "/saving", "w").close()
    else:
        end(75)
if code in ("wait", "slow"):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, save)
    open(os.environ["CALLS"] + "/ready", "w").close()
    for _ in range(600):
        time.sleep(0.1)
end(int(code))
"""


class Site:
    def __init__(self, root: Path):
        self.root, self.calls, self.bin, self.output = root, root / "calls", root / "bin", root / "out"
        for folder in (self.calls, self.bin, self.output):
            folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fakepython", RUN.format(python=sys.executable))):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, code: str, restarts: int = 0, output: str = "", **options) -> subprocess.Popen:
        output = output or str(self.output)
        environ = {name: options.pop(name) for name in list(options) if name.startswith("SLURM")}
        job = SlurmJob(recipe="tiny", output=output, python=str(self.bin / "fakepython"), **options)
        script = self.output / "job.sbatch"
        script.write_text(render_sbatch(job))
        env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "CODE": code,
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_RESTART_COUNT": str(restarts),
            **environ,
        }
        return subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, text=True, cwd=self.root)

    def requeues(self) -> list[str]:
        file = self.calls / "scontrol"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def waiting(site, code="wait"):
    """Starts a job that runs until it is told to end."""
    process = site.start(code)
    deadline = time.monotonic() + 20
    while not (site.calls / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_signal_before_the_limit_saves_and_requeues_once(site):
    process = waiting(site)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert site.requeues() == ["requeue 41"]


def test_a_save_that_goes_on_to_the_limit_still_requeues(site):
    process = waiting(site, code="slow")
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not (site.calls / "saving").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert site.requeues() == ["requeue 41"]


def test_a_job_that_is_cancelled_saves_and_stays_away(site):
    process = waiting(site)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert site.requeues() == []


@pytest.mark.parametrize("code", ["0", "3", "6", "7"])
def test_only_75_requeues(site, code):
    assert site.start(code).wait(20) == int(code)
    assert site.requeues() == []


def test_a_stale_75_of_an_earlier_life_is_not_believed(site):
    (site.output / "exit_status.json").write_text('{"exit_code": 75}')
    assert site.start("crash").wait(20) != 0
    assert site.requeues() == []


def test_requeues_are_bounded(site):
    assert site.start("75", restarts=100).wait(20) == 75
    assert site.requeues() == []


def test_a_requeue_that_slurm_refuses_is_no_success(site):
    (site.bin / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo node-a\n')
    assert site.start("75").wait(20) == 75


def test_the_run_gets_recipe_overrides_and_output(site):
    assert site.start("0", overrides=("train.steps=3",)).wait(20) == 0
    assert (
        site.calls / "argv"
    ).read_text() == f"-m megatron_inherit train tiny train.steps=3 run.output={site.output}\n"


def test_the_step_asks_for_the_cores_of_the_job(site):
    assert site.start("0", cpus_per_gpu=6).wait(20) == 0
    assert "--cpus-per-task=6" in (site.calls / "srun").read_text().splitlines()
    assert site.start("0", cpus_per_gpu=6, SLURM_CPUS_PER_TASK="4").wait(20) == 0  # sbatch --cpus-per-task=4 JOB
    assert "--cpus-per-task=4" in (site.calls / "srun").read_text().splitlines()


def test_a_folder_that_the_script_would_not_take_is_refused():
    with pytest.raises(UsageError, match="Pass --output"):
        SlurmJob(recipe="tiny", output="/o", overrides=("run.output=/elsewhere",))


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
def test_every_form_is_clean_under_shellcheck(tmp_path, container):
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed: apt-get install shellcheck")
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    job = SlurmJob(
        recipe="r", output="/o", container=container, image="i.sif", partition="gpu", setup="module load cuda"
    )
    script = tmp_path / "job.sbatch"
    script.write_text(render_sbatch(job))
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("more", [(), ("/d:/d", "/e:/e")])
def test_pyxis_sees_the_folder_of_submission_and_the_run_s(site, more):
    assert site.start("75", container="pyxis", image="nvcr.io/x:1", output="out", mounts=more).wait(20) == 0
    options = (site.calls / "srun").read_text().splitlines()
    mounts = ",".join((f"{site.root}:{site.root}", f"{site.output}:{site.output}", *more))
    assert {"--container-image=nvcr.io/x:1", f"--container-mounts={mounts}", f"--container-workdir={site.root}"} <= set(
        options
    )
    assert (site.calls / "argv").read_text().endswith(f"run.output={site.output}\n")
    assert site.requeues() == ["requeue 41"]


def test_an_image_that_is_a_file_is_not_taken_for_one_of_a_registry(site):
    (site.root / "base.sqsh").touch()
    assert site.start("0", container="pyxis", image="base.sqsh").wait(20) == 0
    assert f"--container-image={site.root}/base.sqsh" in (site.calls / "srun").read_text().splitlines()


def test_apptainer_wraps_the_command(site):
    fake = site.bin / "apptainer"
    fake.write_text('#!/usr/bin/env bash\necho "${@:1:7}" >>"$CALLS/apptainer"\nshift 7\nexec "$@"\n')
    fake.chmod(0o755)
    assert site.start("75", container="apptainer", image="i.sif", mounts=("/d:/d",)).wait(20) == 0
    mounts = f"{site.root}:{site.root},{site.output}:{site.output},/d:/d"
    assert (site.calls / "apptainer").read_text() == f"exec --nv --bind {mounts} --pwd {site.root} i.sif\n"
    assert site.requeues() == ["requeue 41"]


def test_what_sbatch_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch on this machine"):
        submit(tmp_path / "job.sbatch")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\n[ "$1" = --hold ] && echo "Submitted $2" || { echo "bad partition" >&2; exit 1; }\n')
    sbatch.chmod(0o755)
    assert submit(tmp_path / "job.sbatch", ["--hold"]) == f"Submitted {tmp_path / 'job.sbatch'}"
    with pytest.raises(UsageError, match=r"sbatch refused .*job\.sbatch: bad partition"):
        submit(tmp_path / "job.sbatch")


@pytest.mark.parametrize("bad", [{"name": "a b"}, {"output": "$(rm x)"}, {"nodes": 0}, {"container": "pyxis"}])
def test_values_that_would_break_the_script_are_refused(bad):
    with pytest.raises(UsageError):
        SlurmJob(**({"recipe": "r", "output": "/o"} | bad))


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "deepspeed"])
def test_processes_that_cannot_share_the_batch_are_refused_before_the_queue(launcher, capsys):
    words = ["launch", launcher, "tiny-llama-cpu", "--gpus-per-node"]
    assert main([*words, "1"]) == 0
    assert main([*words, "7"]) == 3
    assert "train.global_batch" in capsys.readouterr().err
    assert main([*words, "3", "parallel.tp=2"]) == 3
