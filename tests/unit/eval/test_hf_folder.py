"""A run folder stands for its newest whole checkpoint, whatever its pointer says."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_inherit.arch.presets import preset
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.eval.hf_folder import as_hf_folder

CONFIG = preset("llama-tiny").with_layers(1)


def save(folder, value):
    folder.mkdir(parents=True)
    parts = []
    for spec in enumerate_tensors(CONFIG):
        raw = np.full(spec.numel, value, np.float32).view(np.uint8)
        zeros = (0,) * len(spec.shape)
        parts.append(
            native.StoredPart(spec.name, "weight", spec.shape, zeros, spec.shape, None, "F32", lambda r=raw: r)
        )
    native.write_rank(folder, 0, parts, step=1)
    (folder / "state.json").write_text(json.dumps({"model": CONFIG.to_json()}))
    native.write_manifest(folder, world_size=1, facts={})


@pytest.mark.parametrize("pointer", ["step_00000005\n", "garbage\n", "../../elsewhere\n"])
def test_the_newest_checkpoint_is_taken_and_not_the_one_pointed_at(tmp_path, pointer):
    checkpoints = tmp_path / "run" / "checkpoints"
    save(checkpoints / "step_00000005", 5.0)
    save(checkpoints / "step_00000010", 10.0)
    (checkpoints / "latest").write_text(pointer)
    with as_hf_folder(tmp_path / "run") as folder:
        assert float(load_file(folder / "model.safetensors")["model.norm.weight"][0]) == 10.0
