"""What ``minherit launch`` prints, run on two nodes that share a file system and nothing else."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_inherit.cli.main import main
from tests.support import tiny_run
from tests.support.forked_world import free_port
from tests.support.tiny_run import curve, recipe, rows, status
from tests.support.two_nodes import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
BIN = Path(sys.executable).parent
QUICK = {
    "train": {"steps": 6},
    "checkpoint": {"every_steps": 3},
    "eval": {"every_steps": 6},
    "schedule": {"warmup_steps": 2},
}
SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
run() {
  local rank="$1"; shift
  local node; mapfile -t node <"$NODES/$rank"
  SLURM_PROCID="$rank" SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_ID=0 "${node[@]}" "$@"
}
run 0 "$@" & first=$!
run 1 "$@" & second=$!
trap 'kill -USR1 "$first" "$second" 2>/dev/null' USR1
code=0
for pid in "$first" "$second"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in show) cat "$NODES/names" ;; *) echo "$@" >>"$NODES/requeued" ;; esac
"""
SBATCH = """#!/usr/bin/env bash
script="${!#}"
grep -q '^#SBATCH --nodes=2$' "$script" || { echo "no nodes asked for" >&2; exit 1; }
echo "Submitted batch job 41"
SLURM_JOB_ID=41 SLURM_JOB_NODELIST='two' SLURM_RESTART_COUNT="${RESTARTS:-0}" bash "$script" >"$NODES/job.log" 2>&1
echo $? >"$NODES/job.code"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as both:
        yield both


@pytest.fixture(scope="module")
def environment():
    path = f"{BIN}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_torchrun_on_two_nodes_trains_as_one(tmp_path, corpus, nodes, environment, capsys):
    path = recipe(tmp_path, corpus, **QUICK)
    meeting = f"{nodes[0].name}:{free_port()}"
    assert main(["launch", "torchrun", path, "--nodes", "2", "--gpus-per-node", "1", "--rendezvous", meeting]) == 0
    words = shlex.split(capsys.readouterr().out)
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    agents = []
    for node, log in zip(nodes, logs, strict=True):
        with log.open("w") as out:
            agents.append(subprocess.Popen([*node.prefix, *words], env=environment, stdout=out, stderr=out))
    assert [agent.wait(180) for agent in agents] == [0, 0], "\n".join(log.read_text() for log in logs)
    alone = recipe(tmp_path / "alone", corpus, **QUICK)
    done = subprocess.run([sys.executable, "-m", "megatron_inherit", "train", alone], env=environment, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run/checkpoints/step_00000006/manifest.json").read_text())["world_size"] == 2
    for one, two in zip(rows(tmp_path / "alone/run"), rows(tmp_path / "run"), strict=True):
        assert one["samples"] == two["samples"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.nightly
def test_a_submitted_job_saves_requeues_and_ends_where_an_undisturbed_one_does(
    tmp_path, corpus, nodes, environment, capsys, monkeypatch
):
    site = tmp_path / "site"
    site.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (site / name).write_text(text)
        (site / name).chmod(0o755)
    for number, node in enumerate(nodes):
        (site / str(number)).write_text("\n".join(node.prefix or ("env",)) + "\n")
    (site / "names").write_text("".join(f"{node.name}\n" for node in nodes))
    for name, value in {**environment, "NODES": str(site), "PATH": f"{site}:{environment['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def submit(folder: Path, **more: str) -> int:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        path, output = recipe(folder, corpus, **QUICK), str(folder / "job")
        words = ["--nodes", "2", "--gpus-per-node", "1", "--output", output, "--python", sys.executable, "--submit"]
        assert main(["launch", "slurm", path, *words]) == 0
        assert capsys.readouterr().out == "Submitted batch job 41\n"
        return int((site / "job.code").read_text())

    assert submit(tmp_path / "halves", MI_FAULT="after_step:1:4:usr1") == 0, (site / "job.log").read_text()
    assert (site / "requeued").read_text() == "requeue 41\n"
    assert status(tmp_path / "halves/job")["exit_code"] == 75
    assert [row["step"] for row in rows(tmp_path / "halves/job")] == [1, 2, 3, 4]
    assert submit(tmp_path / "halves", MI_FAULT="", RESTARTS="1") == 0, (site / "job.log").read_text()
    assert submit(tmp_path / "whole", RESTARTS="0") == 0, (site / "job.log").read_text()
    assert curve(tmp_path / "halves/job") == curve(tmp_path / "whole/job")
    assert (site / "requeued").read_text() == "requeue 41\n"
    assert status(tmp_path / "halves/job")["exit_code"] == 0
