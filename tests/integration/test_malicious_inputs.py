"""C5 23: hostile files through the command line. No code of theirs runs; refused in seconds, in little memory."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import llama, random_arrays, write_checkpoint

RUNNER = """
import json, re, sys, time
from megatron_inherit.cli.main import main
started = time.process_time()
code = main(json.loads(sys.argv[1]))
usage = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({"code": code, "seconds": time.process_time() - started, "rss": usage << 10}))
"""


class Evil:
    """Creates a file when a real unpickler reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def evil_archive(path, marker):
    torch.save({"weight": torch.ones(2), "other": Evil(marker)}, path)


def hf_bin(folder, marker):
    (folder / "hf" / "model.safetensors").unlink()
    evil_archive(folder / "hf" / "pytorch_model.bin", marker)
    return folder / "hf", "pytorch_model.bin"


def hf_bin_stream(folder, marker):
    (folder / "hf" / "model.safetensors").unlink()
    value = {"weight": torch.ones(2), "other": Evil(marker)}
    torch.save(value, folder / "hf" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder / "hf", "pytorch_model.bin"


def rank_file(folder, marker):
    evil_archive(folder / "megatron" / "release" / "mp_rank_00" / "model_optim_rng.pt", marker)
    return folder / "megatron", "model_optim_rng.pt"


def dcp_metadata(folder, marker):
    (folder / "torch_dist" / "release" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    return folder / "torch_dist", ".metadata"


def common_state(folder, marker):
    evil_archive(folder / "torch_dist" / "release" / "common.pt", marker)
    return folder / "torch_dist", "common.pt"


def meta_shard(folder, marker):
    evil_archive(folder / "meta" / "consolidated.00.pth", marker)
    return folder / "meta", "consolidated.00.pth"


def universal_file(folder, marker):
    evil_archive(folder / "ds_universal" / "global_step0" / "zero" / "model.norm.weight" / "fp32.pt", marker)
    return folder / "ds_universal", "fp32.pt"


def zip_bomb(folder, marker):
    (folder / "hf" / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "hf" / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 << 20))
    return folder / "hf", "pytorch_model.bin"


def index_outside(folder, marker):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../x.safetensors"}}
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / "x.safetensors")  # where both are, it is taken
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "hf", "index.json"


def huge_header(folder, marker):
    path = folder / "hf" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    return folder / "hf", "model.safetensors"


def gigabyte_header(folder, marker):
    path = folder / "hf" / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30) + b"{")
        file.truncate(9 + (1 << 30))
    return folder / "hf", "model.safetensors"


def gigabyte_config(folder, marker):
    with (folder / "hf" / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    return folder / "hf", "config.json"


CASES = [
    hf_bin,
    hf_bin_stream,
    rank_file,
    dcp_metadata,
    common_state,
    meta_shard,
    universal_file,
    zip_bomb,
    index_outside,
    huge_header,
    gigabyte_header,
    gigabyte_config,
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One small model in every format."""
    config, folder = llama(num_layers=1), tmp_path_factory.mktemp("sound")
    for format in ("hf", "meta", "megatron", "torch_dist", "ds_universal"):
        write_checkpoint(folder / format, config, random_arrays(config), format)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_hostile_checkpoints_are_refused(sound, tmp_path, case):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    marker = tmp_path / "marker"
    folder, file = case(tmp_path, marker)
    command = json.dumps(["convert", str(folder), str(tmp_path / "out"), "--format", "hf"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, command], capture_output=True, text=True, env=environment, timeout=120
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 5, done.stderr
    assert file in done.stderr
    assert "Traceback" not in done.stderr
    assert result["seconds"] < 5
    assert result["rss"] < 500 << 20
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
