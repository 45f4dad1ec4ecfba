"""Check A7: what is not inherited follows the seeded initialisation of the student's own depth, in every layout."""

import math

import numpy as np
import pytest

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import assert_equal, gpt2, llama, random_arrays, read_arrays, write_checkpoint

pytestmark = pytest.mark.slow

LAYERS = (5, 0, 0)
WIDE = {"num_layers": 6, "hidden_size": 320, "num_heads": 8, "head_dim": 40, "vocab_size": 400}
TEACHERS = {
    "llama": llama(**WIDE, num_kv_heads=8, ffn_size=400),
    "gpt2": gpt2(**WIDE, num_kv_heads=8, ffn_size=1280, max_positions=320),
}
MASKS = {
    "attn": ("attn",),
    "mlp": ("mlp",),
    "norms": ("norm", "final_norm"),
    "embeddings and head": ("embed", "pos_embed", "head"),
    "everything": ("embed", "pos_embed", "attn", "mlp", "norm", "final_norm", "head"),
}
RESIDUAL = ("attn.o.weight", "mlp.down.weight")


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request, tmp_path_factory):
    config = TEACHERS[request.param]
    arrays = random_arrays(config)
    return write_checkpoint(tmp_path_factory.mktemp("t") / "teacher", config, arrays, "hf"), config, arrays


def student(folder, teacher, reset, **layout):
    with open_source(teacher) as source:
        plan = plan_inheritance(source, layers=LAYERS, reset=reset, seed=11, layout=Layout(**layout))
        execute(plan, folder, source=source)
    with open_source(folder) as source:
        return read_arrays(source)


def teachers_name(name):
    head, _, rest = name.partition(".")
    if head != "layers":
        return name
    place, _, rest = rest.partition(".")
    return f"layers.{LAYERS[int(place)]}.{rest}"


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_draws_its_parts_and_copies_the_others(tmp_path, teacher, mask):
    path, config, arrays = teacher
    found = student(tmp_path / "student", path, MASKS[mask])
    drawn = 0
    for spec in enumerate_tensors(config.with_layers(len(LAYERS))):
        values = found[spec.name]
        if spec.role not in MASKS[mask]:
            assert values.tobytes() == arrays[teachers_name(spec.name)].tobytes(), spec.name
        elif spec.init in ("ones", "zeros"):
            assert (values == (spec.init == "ones")).all(), spec.name
        else:
            drawn += 1
            std = 0.02 / math.sqrt(2 * len(LAYERS)) if spec.name.endswith(RESIDUAL) else 0.02
            assert values.size >= 100_000, spec.name
            assert abs(values.mean(dtype=np.float64)) / (std / math.sqrt(values.size)) < 4, spec.name
            assert values.std(dtype=np.float64) == pytest.approx(std, rel=0.02), spec.name
    assert drawn or mask == "norms"


def test_a_seed_gives_the_same_bits_in_every_layout(tmp_path, teacher):
    path, _, _ = teacher
    one = student(tmp_path / "one", path, MASKS["everything"])
    for tp, pp in ((2, 1), (1, 3), (2, 3)):
        found = student(tmp_path / f"{tp}-{pp}", path, MASKS["everything"], format="megatron", tp=tp, pp=pp)
        assert_equal(found, one)
