import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.arch.presets import preset
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.compare import compare_manifest
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.checkpoint.manifest import load_file
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import Layout

CONFIG = preset("llama-tiny").with_layers(1)


def values_of(number, shape):
    return np.random.default_rng(number).standard_normal(shape, dtype=np.float32)


def part(name, kind, values, start, shape, flat=None):
    box = values[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    data = box.reshape(-1)[slice(*flat)] if flat else box
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return native.StoredPart(name, kind, values.shape, start, shape, flat, "F32", lambda: raw)


def write(folder, ranks, *, step=20):
    folder.mkdir()
    for rank, parts in enumerate(ranks):
        native.write_rank(folder, rank, parts, step=step)
    (folder / "side").mkdir()
    (folder / "side" / "tokenizer.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"model": CONFIG.to_json(), "step": step}))
    native.write_manifest(folder, world_size=len(ranks), facts={"step": step, "tokens": 5})


def cut_in_two(index, name, kind, values):
    """Gives two ranks' parts: along an axis, along rows, or flat as ZeRO cuts."""
    shape, zeros = values.shape, (0,) * values.ndim
    half = shape[0] // 2
    if index % 3 == 0:
        first = part(name, kind, values, zeros, (half, *shape[1:]))
        return first, part(name, kind, values, (half, *zeros[1:]), (shape[0] - half, *shape[1:]))
    middle = values.size // 3 + index
    return part(name, kind, values, zeros, shape, (0, middle)), part(
        name, kind, values, zeros, shape, (middle, values.size)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "step_00000020"
    tensors, ranks = {}, ([], [])
    for index, spec in enumerate(enumerate_tensors(CONFIG)):
        for kind in ("weight", "exp_avg"):
            values = values_of(len(tensors), spec.shape)
            tensors[spec.name if kind == "weight" else f"{kind}:{spec.name}"] = values
            for rank, piece in zip(ranks, cut_in_two(index, spec.name, kind, values), strict=True):
                rank.append(piece)
    rng = np.arange(7, dtype=np.uint8)
    ranks[1].append(native.StoredPart("rng.cpu", "extra", (7,), (0,), (7,), None, "U8", lambda: rng))
    write(folder, ranks)
    return folder, tensors


def test_every_tensor_comes_back_whatever_cut_it(checkpoint):
    folder, tensors = checkpoint
    native.verify(folder)
    with native.open_source(folder) as source:
        assert source.format == "native"
        assert list(source.tensors) == [spec.name for spec in enumerate_tensors(CONFIG)]
        assert set(source.optimizer) == {key for key in tensors if ":" in key}
        for key, values in tensors.items():
            assert source.read(key).array().tobytes() == values.tobytes()
        assert [file.name for file in source.side_files] == ["tokenizer.json"]
    assert native.read_extras(folder, 1)["rng.cpu"].tolist() == list(range(7))
    assert native.read_extras(folder, 0) == {}


def test_a_run_folder_opens_at_its_newest_finished_checkpoint(checkpoint, tmp_path):
    folder, _ = checkpoint
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000030").mkdir(parents=True)
    (run / "checkpoints" / "step_00000010").symlink_to(folder)
    (run / "checkpoints" / "step_00000020").symlink_to(folder)
    assert native.open_source(run).path.endswith("step_00000020")
    assert native.open_source(run / "checkpoints").path.endswith("step_00000020")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_box_reads_only_its_bytes(checkpoint, data):
    folder, tensors = checkpoint
    with native.open_source(folder) as source:
        key = data.draw(st.sampled_from(sorted(tensors)))
        values = tensors[key]
        bounds = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in values.shape]
        box = tuple(slice(*pair) for pair in bounds)
        before = source.pool.bytes_read
        got = source.read(key, box).array()
        assert np.array_equal(got, values[box])
        if got.ndim == 1 or got.shape[1] == values.shape[1]:
            assert source.pool.bytes_read - before == got.nbytes


def damaged(tmp_path, change):
    folder = tmp_path / "step_00000020"
    values = {spec.name: values_of(n, spec.shape) for n, spec in enumerate(enumerate_tensors(CONFIG))}
    pairs = [cut_in_two(1, name, "weight", v) for name, v in values.items()]
    write(folder, [[a for a, _ in pairs], [b for _, b in pairs]])
    native.verify(folder)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        native.verify(folder)
    return str(caught.value)


def flip_byte(folder):
    path = folder / "rank_00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 16
    path.write_bytes(raw)


def swap(folder):
    a, b = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../x"] = {"size": 1, "xxh3": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_byte, ("rank_00001.safetensors was changed in tensor head.weight (weight)",)),
        (swap, ("rank_0000", "replaced")),
        (lambda f: (f / "rank_00000.safetensors").unlink(), ("rank_00000.safetensors is missing",)),
        (lambda f: (f / "state.json").write_text("{}"), ("state.json",)),
        (lambda f: (f / "rank_00001.json").write_text("["), ("rank_00001.json",)),
        (lambda f: (f / "side" / "tokenizer.json").write_text("{ "), ("tokenizer.json",)),
        (lambda f: (f / "manifest.json").write_text("{"), ("manifest.json is not JSON",)),
        (lambda f: (f / "manifest.json").unlink(), ("manifest.json cannot be read",)),
        (outside, ("outside the checkpoint", "../../x")),
        (lambda f: (f / "rank_00000.safetensors").write_bytes(b"\xff" * 100), ("truncated or was replaced",)),
    ],
)
def test_every_damage_is_found_and_named(tmp_path, change, words):
    message = damaged(tmp_path, change)
    assert all(word in message for word in words), message


def test_a_missing_rank_and_a_missing_element_are_refused(tmp_path):
    folder = tmp_path / "step_00000020"
    values = {spec.name: values_of(n, spec.shape) for n, spec in enumerate(enumerate_tensors(CONFIG))}
    parts = [part(name, "weight", v, (0,) * v.ndim, v.shape, (1, v.size)) for name, v in values.items()]
    write(folder, [parts])
    with pytest.raises(CheckpointError, match="not complete"):
        native.open_source(folder)
    with pytest.raises(CheckpointError, match=r"rank_00001\.json"):
        native.write_manifest(folder, world_size=2, facts={})


def test_weights_of_a_run_in_fp32_go_with_its_moments(tmp_path):
    """Such a run keeps no masters, and a universal checkpoint holds weights as masters alone."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    keys = [(spec, kind) for spec in enumerate_tensors(CONFIG) for kind in kinds]
    values = {(spec.name, kind): values_of(number, spec.shape) for number, (spec, kind) in enumerate(keys)}
    parts = [part(s.name, k, values[s.name, k], (0,) * len(s.shape), s.shape) for s, k in keys]
    write(tmp_path / "step_00000020", [parts])
    with native.open_source(tmp_path / "step_00000020") as source:
        plan = plan_conversion(source, layout=Layout(format="ds_universal"), optimizer=True)
        execute(plan, tmp_path / "out", source=source)
    with open_source(tmp_path / "out") as found:
        assert found.details["optimizer_step"] == 20
        assert compare_manifest(found, load_file(tmp_path / "out" / "manifest.json")) == []
        for (name, kind), expected in values.items():
            key = name if kind == "weight" else f"{kind}:{name}"
            np.testing.assert_array_equal(found.read(key).array(), expected)
