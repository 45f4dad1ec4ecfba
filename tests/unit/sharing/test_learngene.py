"""Learngenes on disk: made from a teacher, read by every tool, expanded to any depth in any format."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import CheckpointError, ConfigError, UsageError
from megatron_inherit.checkpoint.compare import compare_manifest
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.formats.safetensors_file import read_header
from megatron_inherit.checkpoint.manifest import load_file as load_manifest
from megatron_inherit.checkpoint.packing import encode, pack, quantise_rows, unpack, values_of
from megatron_inherit.cli.main import main
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.functions import prune
from megatron_inherit.plan.plan import Layout, TransferPlan
from megatron_inherit.sharing.expand import candidates, compressed, place, plan_descendant
from megatron_inherit.sharing.learngene import plan_auxiliary, plan_extraction, plan_of
from megatron_inherit.sharing.stage_plan import contiguous, cycle, parse_plan
from megatron_inherit.sharing.tensors import enumerate_stored

PLAN = contiguous((2, 1, 3))
HIERARCHICAL = parse_plan("attn=2,2;mlp=4;norm=unshared:4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return {name: make_teacher(tmp_path_factory.mktemp("teacher") / name, name) for name in ("llama-tiny", "gpt2-tiny")}


def make_teacher(folder, name):
    execute(plan_fresh(preset(name).with_layers(6), seed=3), folder)
    return folder


@pytest.fixture(scope="module")
def learngene(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("learngene") / "out"
    with open_source(teacher["llama-tiny"]) as source:
        execute(plan_auxiliary(source, PLAN, start="stepwise"), folder, source=source)
    return folder


def values(source, name):
    return source.read(name).data.tobytes()


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("plan", [PLAN, HIERARCHICAL, cycle(2, 3)], ids=str)
def test_an_auxiliary_of_the_teachers_first_layers_stores_each_once(tmp_path, teacher, name, plan):
    with open_source(teacher[name]) as source:
        transfer = plan_auxiliary(source, plan, start="first")
        assert TransferPlan.from_json(transfer.to_json()) == transfer
        execute(transfer, tmp_path / "gene", source=source)
        with open_source(tmp_path / "gene") as gene:
            assert gene.format == "learngene"
            assert plan_of(gene) == plan
            assert gene.config.num_layers == plan.num_layers
            for layer in range(plan.num_layers):
                for inside, ids in (
                    ("attn.q.weight", plan.attn),
                    ("mlp.up.weight", plan.mlp),
                    ("mlp_norm.weight", plan.norm),
                ):
                    assert values(gene, f"layers.{layer}.{inside}") == values(source, f"layers.{ids[layer]}.{inside}")
            assert values(gene, "embed.weight") == values(source, "embed.weight")


def test_starts_take_the_layers_they_say(tmp_path, teacher):
    """Six teacher layers under stages 2, 1, 3: centres 0, 2, 4; first of each 0, 2, 3; means of each."""
    with open_source(teacher["llama-tiny"]) as source:
        array = lambda layer: source.read(f"layers.{layer}.mlp.up.weight").array()  # noqa: E731
        mean = lambda layers: (sum(array(i).astype(np.float64) for i in layers) / len(layers)).astype(np.float32)  # noqa: E731
        expected = {
            "stepwise": [array(0), array(2), array(4)],
            "lower": [array(0), array(2), array(3)],
            "average": [mean([0, 1]), array(2), mean([3, 4, 5])],
            "first": [array(0), array(1), array(2)],
        }
        for start, wanted in expected.items():
            execute(plan_auxiliary(source, PLAN, start=start), tmp_path / start, source=source)
            with open_source(tmp_path / start) as gene:
                found = [gene.read(f"layers.{layer}.mlp.up.weight").array() for layer in PLAN.first_layers]
            for got, want in zip(found, wanted, strict=True):
                assert np.array_equal(got, want), start
        execute(plan_auxiliary(source, PLAN, start="random", seed=5), tmp_path / "random", source=source)
        with open_source(tmp_path / "random") as gene:
            assert values(gene, "embed.weight") != values(source, "embed.weight")
            assert values(gene, "layers.0.attn.q.weight") == values(gene, "layers.1.attn.q.weight")
            assert values(gene, "layers.1.attn.q.weight") != values(gene, "layers.2.attn.q.weight")


def test_extracting_a_learngene_gives_its_bytes(tmp_path, learngene):
    with open_source(learngene) as source:
        execute(plan_extraction(source), tmp_path / "again", source=source)
    for name in ("learngene.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (learngene / name).read_bytes()


def test_what_layers_share_is_written_once(tmp_path, learngene):
    with open_source(learngene) as source:
        done = execute(plan_extraction(source), tmp_path / "again", source=source)
        half = execute(compressed(plan_extraction(source), "int8"), tmp_path / "small", source=source)
    for folder, transfer in ((tmp_path / "again", done), (tmp_path / "small", half)):
        extents, _ = read_header(FilePool(), str(folder / "learngene.safetensors"))
        assert transfer.bytes_written == sum(extent.nbytes for extent in extents.values())


def test_a_descendants_record_says_its_stages(tmp_path, learngene, capsys):
    assert main(["share", "expand", str(learngene), str(tmp_path / "out"), "--depth", "5", "--place", "front"]) == 0
    said = capsys.readouterr().out
    assert "  stages   0,0,1,1,2\n" in said
    assert "blocks" not in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| learngene's stage for each block | 0,0,1,1,2 |" in card
    record = TransferPlan.from_json(json.loads((tmp_path / "out" / "inherit.json").read_text())["plan"])
    assert record.stages == (0, 0, 1, 1, 2)


def test_another_number_of_repeats_takes_the_same_stages(tmp_path, learngene):
    longer = contiguous((4, 2, 6))
    with open_source(learngene) as source:
        execute(plan_auxiliary(source, longer, start="stepwise"), tmp_path / "longer", source=source)
        with open_source(tmp_path / "longer") as made:
            assert plan_of(made) == longer
            for before, after in zip(PLAN.first_layers, longer.first_layers, strict=True):
                name = "attn.v.weight"
                assert values(made, f"layers.{after}.{name}") == values(source, f"layers.{before}.{name}")


@pytest.mark.parametrize("format", ["hf", "meta", "megatron", "torch_dist", "ds_universal"])
def test_descendants_are_ordinary_models_of_any_depth(tmp_path, learngene, format):
    with open_source(learngene) as source:
        for depth in (3, 4, 8):
            stages = place(PLAN, depth, "front")
            execute(plan_descendant(source, stages, layout=Layout(format=format)), tmp_path / str(depth), source=source)
            with open_source(tmp_path / str(depth), format=format) as made:
                assert made.config == source.config.with_layers(depth)
                assert "sws" not in (made.hf_config or {})
                for layer, stage in enumerate(stages):
                    first = PLAN.first_layers[stage]
                    for inside in ("attn.o.weight", "mlp.gate.weight", "attn_norm.weight"):
                        assert values(made, f"layers.{layer}.{inside}") == values(source, f"layers.{first}.{inside}")


def test_any_tool_takes_a_learngene_as_the_whole_model(tmp_path, learngene):
    with open_source(learngene) as source:
        execute(plan_conversion(source), tmp_path / "whole", source=source)
        with open_source(tmp_path / "whole") as whole:
            assert whole.format == "hf"
            assert plan_of(whole) is None
            for name in source.tensors:
                assert values(whole, name) == values(source, name)


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("method", ["int8", "int4", "2:4"])
def test_compressing_before_or_after_expansion_is_the_same(tmp_path, learngene, method, dtype):
    stages = place(PLAN, 5, "back")
    with open_source(learngene) as source:
        execute(compressed(plan_extraction(source, dtype=dtype), method), tmp_path / "small", source=source)
        execute(plan_descendant(source, stages, compress=method, dtype=dtype), tmp_path / "after", source=source)
        plain = values(source, "layers.0.mlp.up.weight")
    with open_source(tmp_path / "small") as small:
        assert values(small, "layers.0.mlp.up.weight") != plain
        execute(plan_descendant(small, stages), tmp_path / "before", source=small)
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()
    assert "sws_packing" not in (tmp_path / "before" / "config.json").read_text()


@pytest.mark.parametrize(("method", "bits", "kind"), [("int8", 8, "I8"), ("int4", 4, "U8")])
def test_integers_are_stored_packed(tmp_path, learngene, method, bits, kind):
    with open_source(learngene) as source:
        execute(compressed(plan_extraction(source), method), tmp_path / "small", source=source)
        specs = [spec for spec in enumerate_stored(source.config, PLAN) if spec.name.startswith("sws.stages.")]
    stored = load_file(tmp_path / "small" / "learngene.safetensors")
    for spec in specs:
        found = stored[spec.name]
        if len(spec.shape) == 2:
            scale = stored[spec.name.replace(".weight", ".scale")]
            assert (found.dtype, scale.dtype) == ({"I8": np.int8, "U8": np.uint8}[kind], np.float32)
            assert found.size == spec.numel * bits // 8
            assert scale.shape == spec.shape[:1]
        else:
            assert found.dtype == np.float32
    with open_source(tmp_path / "small") as small:
        name = "layers.0.attn.q.weight"
        matrix = small.read(name).array()
        codes = matrix / stored["sws.stages.0.attn.q.scale"][:, None]
        assert np.abs(codes - np.round(codes)).max() < 1e-5
        assert np.abs(codes).max() == pytest.approx(2 ** (bits - 1) - 1)
        assert small.read(name, (slice(3, 5), slice(1, 4))).array().tolist() == matrix[3:5, 1:4].tolist()
        assert compare_manifest(small, load_manifest(tmp_path / "small" / "manifest.json")) == []


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_two_of_four_are_stored_with_their_places(tmp_path, learngene, dtype, capsys):
    """Nine sixteenths of a bf16 matrix: half of its values, and half a byte for every four."""
    with open_source(learngene) as source:
        execute(compressed(plan_extraction(source, dtype=dtype), "2:4"), tmp_path / "small", source=source)
        execute(plan_descendant(source, PLAN.stages, compress="2:4", dtype=dtype), tmp_path / "dense", source=source)
    sizes, _ = read_header(FilePool(), str(tmp_path / "small" / "learngene.safetensors"))
    item = {"F32": 4, "BF16": 2}[dtype]
    with open_source(tmp_path / "small") as small, open_source(tmp_path / "dense") as dense:
        for spec in enumerate_stored(small.config, PLAN):
            if spec.name.startswith("sws.stages.") and len(spec.shape) == 2:
                places = sizes[spec.name.replace(".weight", ".places")]
                rows, columns = spec.shape
                wanted = (rows * columns * item // 2, rows * -(-columns // 8))
                assert (sizes[spec.name].nbytes, places.nbytes) == wanted
                assert (sizes[spec.name].dtype, places.dtype) == (dtype, "U8")
        for name in dense.tensors:
            assert values(small, name) == values(dense, name)
        name = "layers.3.mlp.down.weight"
        matrix = small.read(name).array()
        assert (matrix.reshape(-1, 4) != 0).sum(axis=1).tolist() == [2] * (matrix.size // 4)
        assert small.read(name, (slice(3, 5), slice(1, 7))).array().tolist() == matrix[3:5, 1:7].tolist()
        assert compare_manifest(small, load_manifest(tmp_path / "small" / "manifest.json")) == []
    assert main(["inspect", str(tmp_path / "small")]) == 0
    assert f"({sum(extent.nbytes for extent in sizes.values()):,})" in capsys.readouterr().out


def test_places_hold_zeros_and_equal_magnitudes():
    rows = np.array([[0.0, 0, 0, 0, 1, -1, 1, 1, 0, 0, -0.0, 3], [5, 0, 6, 7, -2, 0, 0, 0, 4, 3, 2, 1]])
    packed = encode(rows, "2:4", "F32")
    assert packed.values.tolist() == prune([rows], keep=2, of=4).tolist()
    assert packed.weight.tolist() == [[0, 0, 1, -1, 0, 3], [6, 7, -2, 0, 4, 3]]
    assert packed.beside.tolist() == [[0b0100_0100, 0b1100], [0b0100_1110, 0b0100]]


def test_columns_that_do_not_split_are_refused(learngene):
    with open_source(learngene) as source:
        transfer = plan_extraction(source)
        ops = [
            replace(op, shape=(op.shape[0], 6)) if op.target.endswith("attn.q.weight") else op for op in transfer.ops
        ]
        with pytest.raises(ConfigError, match=r"attn\.q\.weight do not split into groups of 4"):
            compressed(replace(transfer, ops=tuple(ops)), "2:4")


def test_codes_come_back_whatever_the_width():
    random = np.random.default_rng(1)
    for columns in (1, 2, 7, 8):
        for bits in (8, 4):
            codes, scales = quantise_rows(random.normal(size=(5, columns)), bits)
            assert np.array_equal(unpack(pack(codes, bits), bits, columns), codes)
            assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    codes, scales = quantise_rows(np.zeros((2, 3)), 4)
    assert values_of(codes, scales).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("change", ["no scale", "int8", "2:4", "3:4", "field"])
def test_damaged_packing_is_refused(tmp_path, learngene, change):
    with open_source(learngene) as source:
        execute(compressed(plan_extraction(source), "int4"), tmp_path / "small", source=source)
    file, config = tmp_path / "small" / "learngene.safetensors", tmp_path / "small" / "config.json"
    raw = json.loads(config.read_text())
    if change == "no scale":
        tensors = load_file(file)
        del tensors["sws.stages.1.mlp.up.scale"]
        save_file(tensors, file)
    else:
        raw["sws_packing"] = {"form": change, "dtype": "F32"} if change != "field" else "int4"
        config.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"packed|packing"):
        open_source(tmp_path / "small")


@pytest.mark.parametrize(
    ("rule", "depth", "counts"),
    [
        ("front", 12, (3, 3, 2, 2, 2)),
        ("back", 12, (2, 2, 2, 3, 3)),
        ("middle", 12, (2, 3, 3, 2, 2)),
        ("even", 12, (3, 2, 3, 2, 2)),
        ("proportional", 16, (3, 3, 4, 3, 3)),
        ("", 16, (3, 3, 4, 3, 3)),
        ("proportional", 4, (1, 1, 1, 1, 0)),
        ("even", 3, (1, 1, 0, 1, 0)),
        ("ends", 3, (1, 0, 1, 0, 1)),
        ("ends", 4, (1, 1, 0, 1, 1)),
        ("ends", 1, (1, 0, 0, 0, 0)),
        ("ends", 12, (2, 3, 2, 3, 2)),
        ("0,0,1,4", 4, (2, 1, 0, 0, 1)),
    ],
)
def test_placement_rules(rule, depth, counts):
    stages = place(contiguous((3, 3, 4, 3, 3)), depth, rule)
    assert len(stages) == depth
    assert tuple(stages.count(stage) for stage in range(5)) == counts


def test_the_released_example_is_front():
    assert place(contiguous((3, 3, 4, 3, 3)), 12, "front") == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)


def test_own_depth_proportionally_is_the_own_layout():
    for plan in (PLAN, cycle(3, 2), contiguous((3, 3, 4, 3, 3))):
        assert place(plan, plan.num_layers, "proportional") == plan.stages


def test_auto_tries_each_different_placement_once():
    found = candidates(contiguous((2, 2, 2, 2)), 6)
    assert set(found) == {(0, 0, 1, 1, 2, 3), (0, 1, 1, 2, 2, 3), (0, 1, 2, 2, 3, 3), (0, 0, 1, 2, 2, 3)}
    assert len(candidates(contiguous((2, 2, 2, 2)), 8)) == 1
    assert candidates(contiguous((2, 2, 2, 2)), 3) == {(0, 1, 2): "even", (0, 2, 3): "ends"}


@pytest.mark.parametrize(
    ("rule", "depth", "message"),
    [
        ("front", 4, "cannot hold"),
        ("", 4, "cannot hold.*--place even"),
        ("sideways", 5, "not understood"),
        ("0,1", 3, "each of the 3"),
        ("0,9", 2, "each"),
    ],
)
def test_impossible_placements_are_refused(rule, depth, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        place(contiguous((3, 3, 4, 3, 3)), depth, rule)


def test_a_cycle_has_no_front():
    with pytest.raises(UsageError, match="follow one another"):
        place(cycle(2, 2), 6, "front")


def test_ordinary_models_have_no_learngene(teacher):
    with open_source(teacher["llama-tiny"]) as source:
        with pytest.raises(UsageError, match="no shared stages"):
            plan_extraction(source)
        with pytest.raises(ConfigError, match="more physical layers"):
            plan_auxiliary(source, contiguous((1,) * 7), start="first")


def test_a_damaged_plan_is_refused(tmp_path, learngene):
    import json
    import shutil

    shutil.copytree(learngene, tmp_path / "bad")
    raw = json.loads((learngene / "config.json").read_text())
    for ids, message in (
        (None, "does not say"),
        ({"attn": [0], "mlp": [0], "norm": [0]}, "does not say"),
        ({name: [0, 0, 1, 2, 2, 3] for name in ("attn", "mlp", "norm")}, "has no tensor sws.stages.3"),
    ):
        (tmp_path / "bad" / "config.json").write_text(json.dumps(raw | {"sws": ids}))
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / "bad")
