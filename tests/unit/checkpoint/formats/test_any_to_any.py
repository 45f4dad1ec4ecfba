"""Every format to every other, by the planner and the executor: checks 1, 2, 6, 12 and 20 of the converters' bar."""

import itertools
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.checkpoint import layout
from megatron_inherit.checkpoint.detect import detect_format, open_source
from megatron_inherit.checkpoint.layout import Run
from megatron_inherit.checkpoint.manifest import hash_source
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute, plan_sink
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import assert_equal, gpt2, llama, numbered_arrays, read_arrays, write_checkpoint
from tests.unit.checkpoint.formats.test_megatron_legacy import pack

LAYOUTS = {
    "hf": Layout(format="hf", max_shard_bytes=20_000),
    "meta": Layout(format="meta", tp=2),
    "megatron": Layout(format="megatron", tp=4, pp=2),
    "megatron legacy": Layout(format="megatron", tp=2, pp=2, vpp=2, dialect="legacy"),
    "torch_dist": Layout(format="torch_dist", tp=2, pp=2),
    "torch_dist global": Layout(format="torch_dist", dialect="global", iteration=3),
    "ds_universal": Layout(format="ds_universal"),
    "ds_universal megatron": Layout(format="ds_universal", dialect="local"),
}
CONFIGS = {"llama": llama(), "gpt2": gpt2()}


def convert(source, target, layout_):
    shutil.rmtree(target, ignore_errors=True)
    with open_source(source) as opened:
        execute(plan_conversion(opened, layout=layout_), target, source=opened)
    return target


def content(folder):
    """Gives every file but those that name the source or the day."""
    skip = re.compile(r"inherit\.json|environment\.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not skip.fullmatch(path.name)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for family, config in CONFIGS.items():
        write_checkpoint(folder / family / "origin", config, numbered_arrays(config), "hf")
        for name, layout_ in LAYOUTS.items():
            if (family, name) != ("gpt2", "meta"):
                convert(folder / family / "origin", folder / family / name, layout_)
    return folder


def names_of(family):
    return [name for name in LAYOUTS if (family, name) != ("gpt2", "meta")]


def plain_names_of(family):
    """One layout a format."""
    return [name for name in names_of(family) if name == LAYOUTS[name].format]


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_format_is_found_out_and_holds_the_same_model(folder, family):
    """Check 20: one manifest, whatever the format, the parallel sizes or the dialect."""
    expected = None
    for name in names_of(family):
        assert detect_format(str(folder / family / name)) == LAYOUTS[name].format
        with open_source(folder / family / name) as source:
            assert source.config == CONFIGS[family]
            assert_equal(read_arrays(source), numbered_arrays(CONFIGS[family]))
            hashes = hash_source(source)
        expected = expected or hashes
        assert hashes == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_ordered_pair_goes_there_and_back(folder, family, tmp_path):
    """Checks 1 and 2: A -> B -> A is A, and A -> B -> C is A -> C, file by file and byte by byte."""
    for first, second in itertools.permutations(plain_names_of(family), 2):
        convert(folder / family / first, tmp_path / "there", LAYOUTS[second])
        assert content(tmp_path / "there") == content(folder / family / second), (first, second)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_way_from_one_layout_to_another_is_the_same(folder, tmp_path, data):
    """Check 2 over random layouts in between."""
    between = data.draw(st.sampled_from(["megatron", "torch_dist", "meta"]))
    options = {"tp": data.draw(st.sampled_from([1, 2])), "pp": data.draw(st.sampled_from([1, 2, 4]))}
    last = LAYOUTS[data.draw(st.sampled_from(names_of("llama")))]
    convert(folder / "llama" / "hf", tmp_path / "between", Layout(format=between, **options))
    convert(tmp_path / "between", tmp_path / "last", last)
    convert(folder / "llama" / "hf", tmp_path / "direct", last)
    assert content(tmp_path / "last") == content(tmp_path / "direct")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[3, 1], [2, 2, 0, 1, 1]])
def test_slice_reset_and_reshard_in_one_pass(folder, tmp_path, layers):
    """Check 12: from every format to every other the same student, its fresh values too."""
    expected = None
    names = plain_names_of("llama")
    for number, name in enumerate(names):
        target = LAYOUTS[names[number - 1]]
        fitted = Layout(format=target.format, tp=target.tp, dialect=target.dialect)
        with open_source(folder / "llama" / name) as source:
            plan = plan_inheritance(source, layers=layers, reset=["norm", "head"], seed=3, layout=fitted)
            predicted = dict(plan_sink(plan, source.side_files).sizes)
            done = execute(plan, tmp_path / str(number), source=source)
        assert done.files == predicted
        assert all((tmp_path / str(number) / file).stat().st_size == size for file, size in predicted.items())
        with open_source(tmp_path / str(number)) as source:
            found = read_arrays(source)
        expected = expected or found
        assert_equal(found, expected)
    teacher = numbered_arrays(CONFIGS["llama"])
    for layer, origin in enumerate(layers):
        for part in ("attn.k", "attn.o", "mlp.gate", "mlp.down"):
            np.testing.assert_array_equal(
                expected[f"layers.{layer}.{part}.weight"], teacher[f"layers.{origin}.{part}.weight"]
            )
    assert (expected["layers.0.attn_norm.weight"] == 1).all()
    assert not np.array_equal(expected["head.weight"], teacher["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_no_byte(folder, tmp_path, threads):
    with open_source(folder / "llama" / "hf") as source:
        execute(plan_conversion(source, layout=LAYOUTS["megatron"]), tmp_path / "out", source=source, threads=threads)
    assert content(tmp_path / "out") == content(folder / "llama" / "megatron")


def wrong_qkv(tensor, index, tp):
    """Query, key and value one after another, as GPT-NeoX and nanotron have them."""
    sizes = [part.shape[0] for part in tensor.parts]
    return [Run(0, sizes[index], sum(sizes[:index]))]


def wrong_gate(tensor, index, tp):
    """[up; gate], as epfLLM has it."""
    own = tensor.parts[index].shape[0] // tp
    return [Run(rank * own, own, rank * 2 * own + (1 - index) * own) for rank in range(tp)]


def naive_shards(tensor, index, tp):
    """Gates before ups over all ranks: right for one rank only."""
    size = tensor.parts[0].shape[0]
    return [Run(0, size, index * size)]


@pytest.mark.parametrize(
    ("fuse", "wrong"), [("qkv", wrong_qkv), ("concat_per_shard", wrong_gate), ("concat_per_shard", naive_shards)]
)
def test_a_planted_swap_is_caught(tmp_path, monkeypatch, fuse, wrong):
    """Check 6: each wrong order round-trips through itself, and fails against the formula."""
    config = llama()
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path / "right", config, arrays, "megatron", tp=2)
    right = layout._runs

    def mutated(tensor, index, tp):
        return wrong(tensor, index, tp) if tensor.row.fuse == fuse else right(tensor, index, tp)

    monkeypatch.setattr(layout, "_runs", mutated)
    write_checkpoint(tmp_path / "wrong", config, arrays, "megatron", tp=2)
    with open_source(tmp_path / "wrong") as source:
        assert_equal(read_arrays(source), arrays)
    with open_source(tmp_path / "right") as source:
        found = read_arrays(source)
    touched = "attn.k" if fuse == "qkv" else "mlp.gate"
    assert not np.array_equal(found[f"layers.0.{touched}.weight"], arrays[f"layers.0.{touched}.weight"])
    if fuse == "qkv":
        monkeypatch.setattr(layout, "_runs", right)
        with open_source(tmp_path / "wrong") as source:
            assert not np.array_equal(pack(read_arrays(source), config, 0), pack(arrays, config, 0))
