"""Any format to any other at any layout, sliced on the way or not: byte for byte, whatever the path."""

import dataclasses
import itertools
import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint import manifest
from megatron_inherit.checkpoint.compare import compare
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import FAMILIES, llama, random_arrays, write_checkpoint

pytestmark = pytest.mark.slow

FORMATS = ("hf", "megatron", "torch_dist", "ds_universal", "meta")
SLOW = settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def without_waiting_for_the_disk():
    """Nothing here is about durability."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def formats_of(config):
    return [name for name in FORMATS if name != "meta" or config.family == "llama"]


@st.composite
def layouts(draw, config):
    """A format with parallel sizes that the model allows."""
    name = draw(st.sampled_from(formats_of(config)))
    tp = draw(st.sampled_from([1, 2, 4])) if name != "hf" else 1
    if name not in ("megatron", "torch_dist"):
        return Layout(format=name, tp=tp, max_shard_bytes=draw(st.sampled_from([9_000, 10**9])))
    pp = draw(st.sampled_from([size for size in (1, 2, 3) if config.num_layers % size == 0]))
    chunks = [size for size in (1, 2) if pp > 1 and config.num_layers % (pp * size) == 0] or [1]
    vpp = draw(st.sampled_from(chunks)) if name == "megatron" else 1
    return Layout(format=name, tp=tp, pp=pp, vpp=vpp, vocab_multiple=draw(st.sampled_from([1, 16, 128])))


def move(path, output, layout, layers=None, **more):
    with open_source(path) as source:
        if layers is None:
            plan = plan_conversion(source, layout=layout)
        else:
            plan = plan_inheritance(source, layers=layers, layout=layout, dtype="F32", **more)
        done = execute(plan, output, source=source)
        assert {name: (output / name).stat().st_size for name in done.files} == dict(done.files)
    return output


def assert_same(left, right):
    with open_source(left) as one, open_source(right) as other:
        assert compare(one, other) == []
        assert one.config.to_json() | {"max_positions": 0} == other.config.to_json() | {"max_positions": 0}


@SLOW
@given(st.data())
def test_paths_agree_and_lead_back(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("paths")
    config = data.draw(st.sampled_from(list(FAMILIES.values())))
    config = config.with_layers(data.draw(st.sampled_from([2, 4, 6])))
    write_checkpoint(folder / "origin", config, random_arrays(config), "hf")
    try:
        first = move(folder / "origin", folder / "a", data.draw(layouts(config)))
        second = move(first, folder / "b", data.draw(layouts(config)))
    except CheckpointError as error:
        assume("cannot be cut" not in str(error) and "padding" not in str(error))
        raise
    straight = move(folder / "origin", folder / "c", Layout())
    assert_same(second, straight)
    assert_same(move(second, folder / "back", Layout()), folder / "origin")
    manifests = [json.loads((path / manifest.NAME).read_text())["tensors"] for path in (first, second, straight)]
    assert manifests[0] == manifests[1] == manifests[2]


@SLOW
@given(st.data())
def test_slicing_commutes_with_converting(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("slices")
    config = data.draw(st.sampled_from(list(FAMILIES.values()))).with_layers(4)
    write_checkpoint(folder / "origin", config, random_arrays(config), "hf")
    layers = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(lambda chosen: len(chosen) % 2 == 0))
    reset = data.draw(st.sets(st.sampled_from(["mlp", "norm", "attn", "final_norm"]), max_size=2))
    seed = data.draw(st.integers(0, 9))
    student = config.with_layers(len(layers))
    try:
        teacher = move(folder / "origin", folder / "teacher", data.draw(layouts(config)))
        both = move(teacher, folder / "both", data.draw(layouts(student)), layers, reset=sorted(reset), seed=seed)
    except CheckpointError as error:
        assume("cannot be cut" not in str(error))
        raise
    alone = move(folder / "origin", folder / "alone", Layout(), layers, reset=sorted(reset), seed=seed)
    assert_same(both, alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_ordered_pair_at_two_by_two(tmp_path, family):
    config = dataclasses.replace(FAMILIES[family], num_layers=4)
    write_checkpoint(tmp_path / "origin", config, random_arrays(config), "hf")
    for first, second in itertools.permutations(formats_of(config), 2):
        paths = [tmp_path / f"{first}-{second}-{number}" for number in range(3)]
        options = {
            name: Layout(format=name, tp=2, pp=2 if name in ("megatron", "torch_dist") else 1) for name in FORMATS
        }
        move(tmp_path / "origin", paths[0], options[first])
        move(paths[0], paths[1], options[second])
        move(paths[1], paths[2], options[first])
        assert_same(paths[2], paths[0])
        assert_same(paths[2], tmp_path / "origin")


def test_depth_that_no_pipeline_divides_is_refused_with_what_would(tmp_path):
    config = llama(num_layers=4)
    write_checkpoint(tmp_path / "origin", config, random_arrays(config), "hf")
    for name in ("megatron",):
        with pytest.raises(CheckpointError, match=r"3 layers cannot be shared out over 2 .*size of \[1, 3\]"):
            move(tmp_path / "origin", tmp_path / name, Layout(format=name, pp=2), [0, 1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]
