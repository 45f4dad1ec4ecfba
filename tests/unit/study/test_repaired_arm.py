"""An arm whose start is repaired: what was fitted is what it starts from, and the record says so."""

import json

import pytest
from safetensors.numpy import load_file

from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.study.arms import make_start
from megatron_inherit.study.schema import RepairSection
from tests.support.tiny_hf import tiny_gpt2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_gpt2(tmp_path_factory.mktemp("model") / "tiny", layers=4)


def test_only_what_the_repair_fits_differs_from_the_plain_start(tmp_path, teacher):
    plain = make_start(teacher, tmp_path / "plain", layers="first:2")
    repaired = make_start(teacher, tmp_path / "repaired", layers="first:2", repair=RepairSection(methods="final-norm"))
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, repaired))
    assert one.keys() == other.keys()
    changed = {name.removeprefix("transformer.") for name in one if one[name].tobytes() != other[name].tobytes()}
    assert changed == {"ln_f.weight", "ln_f.bias"}
    record = json.loads((repaired / "inherit.json").read_text())
    assert record["start"]["repair"] == {"methods": "final-norm", "text": None}
    losses = record["repair"]["held_out_loss"]
    assert losses["repaired"] < losses["plain"]
    assert "repair" not in json.loads((plain / "inherit.json").read_text())["start"]
    with pytest.raises(ConfigError, match="holds another start"):
        make_start(teacher, tmp_path / "repaired", layers="first:2")


def test_a_repair_may_choose_other_blocks(tmp_path, teacher):
    start = make_start(teacher, tmp_path / "start", layers="first:2", repair=RepairSection(methods="keep-last:1"))
    assert json.loads((start / "inherit.json").read_text())["plan"]["layer_map"] == [0, 3]


def test_an_unknown_repair_is_refused(tmp_path, teacher):
    with pytest.raises(UsageError, match="unknown method 'magic'"):
        make_start(teacher, tmp_path / "start", layers="first:2", repair=RepairSection(methods="magic"))
    assert not (tmp_path / "start").exists()
