"""Optimizer state on a local disk: what is refused before the first step, and that the run is the one in memory."""

import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_inherit.engines.deepspeed import async_io
from tests.support import forked_world, tiny_run
from tests.support.tiny_run import curve, recipe, rows, saved_hashes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WIDE = {"num_layers": 2, "hidden_size": 256, "head_dim": 64, "ffn_size": 512}
"""Of which a rank's share of the matrices is more than the megabyte that DeepSpeed writes at least."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload("megatron_inherit.engines.deepspeed.engine")
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


def train(folder, corpus, *overrides, before=None, size=1, **environ):
    words = ["engine=deepspeed", "deepspeed.zero_stage=3", "deepspeed.offload=optimizer", "train.steps=8"]
    path = recipe(folder, corpus, model={"shape": WIDE})
    return forked_world.run(
        folder, ["train", path, *words, *overrides], size=size, timeout=400, before=before, **environ
    )


def without_libaio():
    from deepspeed.ops.op_builder import AsyncIOBuilder

    kind = type(AsyncIOBuilder())
    kind.is_compatible = lambda self, verbose=False: False


def listing(found):
    """Gives what notes the files of each rank before its end removes them."""

    def before():
        from megatron_inherit.engines.deepspeed import nvme

        remove = nvme._remove

        def noted(path, held):
            names = [file.name for file in path.rglob("*") if file.is_file()]
            (found / f"rank{os.environ['RANK']}.txt").write_text("\n".join(sorted(names)))
            remove(path, held)

        nvme._remove = noted

    return before


def test_a_folder_that_is_not_there_is_refused_before_the_first_step(tmp_path, corpus):
    ended = train(tmp_path, corpus, f"deepspeed.nvme_path={tmp_path / 'none'}")
    assert ended.codes == [3], ended.text
    assert f"deepspeed.nvme_path: {tmp_path / 'none'} is not a folder on" in ended.text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, corpus):
    ended = train(tmp_path, corpus, "deepspeed.nvme_path=/proc")
    assert ended.codes == [3], ended.text
    assert "deepspeed.nvme_path: /proc cannot be written on" in ended.text


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, corpus):
    def small():
        from megatron_inherit.engines.deepspeed import nvme

        nvme.operation_problem = str
        shutil.disk_usage = lambda path: SimpleNamespace(free=10**9 if path != str(tmp_path) else 10_000_000)

    ended = train(tmp_path, corpus, f"deepspeed.nvme_path={tmp_path}", before=small, size=2)
    assert ended.codes == [7, 7], ended.text
    assert f"deepspeed.nvme_path: not enough space on the file system of {tmp_path} on" in ended.text
    assert "9.54 MiB free" in ended.text
    assert not list(tmp_path.glob("minherit.tmp-*"))


def test_each_process_has_a_folder_of_its_own_and_removes_what_the_dead_left(tmp_path, monkeypatch):
    from megatron_inherit.engines.deepspeed import nvme

    def die():
        kept = nvme.OwnFolder(tmp_path)
        os._exit(9 if kept.path.is_dir() else 1)

    monkeypatch.setattr(nvme, "operation_problem", str)
    assert forked_world.World(tmp_path / "logs", 1, die, {}).wait().codes == [9]
    assert list(tmp_path.glob("minherit.tmp-*"))
    first, second = (nvme.claim_folder(str(tmp_path), 1, lambda text: [text]) for _ in range(2))
    assert sorted(tmp_path.glob("minherit.tmp-*")) == sorted([first.path, second.path])
    first.remove()
    assert list(tmp_path.glob("minherit.tmp-*")) == [second.path]
    del second
    assert not list(tmp_path.glob("minherit.tmp-*")), "also where nobody closes it"


def test_a_machine_without_the_operation_is_refused_before_the_first_step(tmp_path, corpus):
    ended = train(tmp_path, corpus, f"deepspeed.nvme_path={tmp_path}", before=without_libaio)
    assert ended.codes == [3], ended.text
    assert "async_io operation needs libaio" in ended.text
    assert "apt-get install libaio-dev" in ended.text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_build_that_a_killed_process_left_is_not_awaited_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(async_io, "SILENT_SECONDS", 0.5)
    lock = tmp_path / "lock"
    assert async_io.await_build(tmp_path) is None
    lock.touch()
    assert async_io.await_build(tmp_path) == lock

    def build():
        for number in range(20):
            (tmp_path / f"{number}.o").touch()
            time.sleep(0.05)
        lock.unlink()

    builder = threading.Thread(target=build)
    builder.start()
    assert async_io.await_build(tmp_path) is None, "a build that goes on may take longer than that"
    builder.join()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_run_with_its_optimizer_on_a_disk_is_the_one_in_memory(tmp_path, corpus):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        skip = pytest.fail if os.environ.get("CI") else pytest.skip
        skip("DeepSpeed's async_io needs the Debian package libaio-dev")
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", build], env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True)
    ended = train(tmp_path / "memory", corpus, size=2)
    assert ended.codes == [0, 0], ended.text
    disk = tmp_path / "disk"
    disk.mkdir()
    stopped = train(tmp_path / "files", corpus, f"deepspeed.nvme_path={disk}", "train.stop_after=3", size=2)
    assert stopped.codes == [75, 75], stopped.text
    words = [f"deepspeed.nvme_path={disk}", "checkpoint.asynchronous=true"]
    ended = train(tmp_path / "files", corpus, *words, size=2, before=listing(tmp_path))
    assert ended.codes == [0, 0], ended.text
    assert "Resuming after step 3" in ended.text
    assert len(rows(tmp_path / "files/run")) == 8
    assert curve(tmp_path / "files/run") == curve(tmp_path / "memory/run")
    assert saved_hashes(tmp_path / "files/run", 8) == saved_hashes(tmp_path / "memory/run", 8)
    for rank in range(2):
        names = (tmp_path / f"rank{rank}.txt").read_text()
        assert names.count("exp_avg-") == names.count("exp_avg_sq-") == 1, "the matrices' moments, and no smaller ones"
    assert list(disk.iterdir()) == []
    stopped = train(tmp_path / "killed", corpus, f"deepspeed.nvme_path={disk}", MI_FAULT="after_step:0:2:kill")
    assert stopped.codes == [-9], stopped.text
    assert len(list(disk.iterdir())) == 1
    ended = train(tmp_path / "killed", corpus, f"deepspeed.nvme_path={disk}")
    assert ended.codes == [0], ended.text
    assert list(disk.iterdir()) == []
