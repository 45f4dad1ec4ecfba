"""docs/adding_a_family.md, carried out: a row list and its foreign names, then every format holds the family."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.arch.families import FAMILIES
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.formats import hf, hf_config
from megatron_inherit.checkpoint.formats.safetensors_file import read_header
from tests.support.checkpoints import assert_equal, llama, numbered_arrays, read_arrays, write_checkpoint
from tests.unit.checkpoint.formats.test_megatron_legacy import pack

PAGE = Path(__file__).parents[4] / "docs" / "adding_a_family.md"
TABLES = (FAMILIES, hf.ROWS, hf_config.ARCHITECTURES)


@pytest.fixture
def config():
    """Runs the page's own code, and takes the family away afterwards."""
    assert all("internlm2" not in table for table in TABLES)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    yield llama(family="internlm2")
    for table in TABLES:
        del table["internlm2"]


@pytest.mark.parametrize("format", ["hf", "megatron", "torch_dist", "ds_universal", "meta"])
def test_every_format_holds_the_new_family(tmp_path, config, format):
    arrays = numbered_arrays(config)
    options = {"megatron": {"tp": 2, "pp": 2}, "torch_dist": {"tp": 2, "pp": 2}, "meta": {"tp": 2}}.get(format, {})
    write_checkpoint(tmp_path, config, arrays, format, **options)
    with open_source(tmp_path) as source:
        assert source.format == format
        assert source.config == config
        assert_equal(read_arrays(source), arrays)


def test_the_fused_matrix_is_per_group(tmp_path, config):
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path, config, arrays, "hf")
    with open_source(tmp_path) as source:
        extents, _ = read_header(FilePool(), str(tmp_path / "model.safetensors"))
        extent = extents["model.layers.1.attention.wqkv.weight"]
        raw = source.pool.read(extent.file, extent.offset, extent.nbytes)
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(extent.shape), pack(arrays, config, 1))
