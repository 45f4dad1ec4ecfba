import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_inherit.arch.tensors import tensor_table
from megatron_inherit.base.atomic import new_folder
from megatron_inherit.base.errors import CheckpointError, DiskError, UsageError
from megatron_inherit.checkpoint import manifest
from megatron_inherit.checkpoint.compare import compare
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.dtypes import cast
from megatron_inherit.checkpoint.gather import row_major
from megatron_inherit.inherit.inheritune import fresh_op, plan_fresh, plan_inheritance
from megatron_inherit.plan import movement
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute, plan_sink
from megatron_inherit.plan.init import draw
from megatron_inherit.plan.ops import Compute, File, Tie
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import assert_equal, gpt2, llama, random_arrays, read_arrays, write_checkpoint


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(llama())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, arrays):
    folder = write_checkpoint(tmp_path_factory.mktemp("t") / "teacher", llama(), arrays, "hf", max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    return folder


def run(plan, folder, **options):
    execute(plan, folder, **options)
    with open_source(folder) as source:
        return read_arrays(source)


def test_any_map_is_bitwise(teacher, arrays, tmp_path):
    layers = [3, 0, 0, 2, 1]
    with open_source(teacher) as source:
        found = run(plan_inheritance(source, layers=layers), tmp_path / "s", source=source)
    expected = {}
    for name in tensor_table(llama(num_layers=5)):
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(layers[int(parts[1])])
        expected[name] = arrays[".".join(parts)]
    assert_equal(found, expected)
    assert (tmp_path / "s" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "s" / "LICENSE").read_text() == "free"


def test_fresh_values_do_not_depend_on_threads_and_have_their_scale(teacher, tmp_path):
    with open_source(teacher) as source:
        plan = plan_inheritance(source, layers=[0, 1], reset=("attn", "embed"), seed=7)
        one = run(plan, tmp_path / "one", source=source, threads=1)
        many = run(plan, tmp_path / "many", source=source, threads=7)
    assert_equal(many, one)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert files[0] == files[1]
    specs = tensor_table(llama(num_layers=2))
    for name in ("embed.weight", "layers.1.attn.o.weight"):
        assert np.array_equal(one[name].ravel(), draw(specs[name], num_layers=2, seed=7))
    assert one["layers.1.attn.o.weight"].std() == pytest.approx(0.02 / 2, rel=0.1)
    assert one["embed.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_casts_round_to_nearest_even(teacher, arrays, tmp_path):
    with open_source(teacher) as source:
        found = run(plan_inheritance(source, layers=[0], dtype="BF16"), tmp_path / "s", source=source)
    assert np.array_equal(found["head.weight"], cast(arrays["head.weight"], "F32", "BF16"))
    with open_source(tmp_path / "s") as source:
        wide = run(plan_conversion(source, dtype="F32"), tmp_path / "wide", source=source)
    assert np.array_equal(cast(wide["head.weight"], "F32", "BF16"), found["head.weight"])


def test_bfloat16_specials():
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.00390625, 1.01171875, 3.4e38], np.float32)
    found = cast(values, "F32", "BF16")
    assert np.isnan(cast(found[:1], "BF16", "F32"))[0]
    assert cast(found[1:], "BF16", "F32").tolist() == [np.inf, -np.inf, 0.0, -0.0, 1.0, 1.015625, np.inf]


@pytest.mark.parametrize(
    ("stored", "target", "large"), [("F32", "F16", 1e5), ("F32", "BF16", 3.4e38), ("BF16", "F16", -7e4)]
)
def test_values_beyond_the_range_of_a_type_are_refused(arrays, tmp_path, stored, target, large):
    changed = {name: values.copy() for name, values in arrays.items()}
    changed["layers.1.mlp.up.weight"][[0, 40], [3, 5]] = large
    changed["layers.1.mlp.up.weight"][2, 2] = np.inf  # it was so before
    folder = tmp_path / "teacher"
    write_checkpoint(folder, llama(), {n: cast(v, "F32", stored) for n, v in changed.items()}, "hf", dtype=stored)
    for write in ("hf", "megatron"):
        with open_source(folder) as source:
            plan = plan_conversion(source, dtype=target, layout=Layout(format=write))
            with pytest.raises(
                CheckpointError, match=f"up.weight: 2 of 1536 values are beyond .* of {target}"
            ) as refusal:
                execute(plan, tmp_path / "s", source=source)
        assert f"{abs(large):.0e}"[0] == str(refusal.value.got)[0]
        assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_values_within_the_range_and_infinities_are_cast_in_silence(arrays, tmp_path):
    changed = arrays | {"final_norm.weight": np.full(32, 65504.0, np.float32)}
    changed["final_norm.weight"][:3] = np.inf, -np.inf, np.nan
    write_checkpoint(tmp_path / "teacher", llama(), changed, "hf")
    with open_source(tmp_path / "teacher") as source:
        found = run(plan_conversion(source, dtype="F16"), tmp_path / "s", source=source)
    assert np.array_equal(found["final_norm.weight"], changed["final_norm.weight"].astype(np.float16), equal_nan=True)


def test_boxes_ties_functions_and_files(teacher, arrays, tmp_path):
    with open_source(teacher) as source:
        plan = plan_conversion(source)
        ops = {op.target: op for op in plan.ops}
        small = llama(vocab_size=100)
        ops["embed.weight"] = dataclasses.replace(ops["embed.weight"], shape=(100, 32), box=((30, 130), (0, 32)))
        ops["head.weight"] = Tie(target="head.weight", shape=(100, 32), dtype="F32", to="embed.weight")
        inputs = ("layers.0.mlp.up.weight", "layers.3.mlp.up.weight")
        ops["layers.1.mlp.up.weight"] = Compute(
            target="layers.1.mlp.up.weight", shape=(48, 32), dtype="F32", function="mean", sources=inputs
        )
        ops["layers.2.mlp.up.weight"] = File(
            target="layers.2.mlp.up.weight",
            shape=(48, 32),
            dtype="F32",
            file=str(next(teacher.glob("*-00001-*"))),
            name="model.embed_tokens.weight",
        )
        dropped = dict.fromkeys(("head.weight", "layers.1.mlp.up.weight", "layers.2.mlp.up.weight"), "test")
        plan = dataclasses.replace(plan, config=small, ops=tuple(ops.values()), dropped=dropped)
        plan = dataclasses.replace(plan, hf_config={**plan.hf_config, "vocab_size": 100})
        with pytest.raises(CheckpointError, match="wrong shape"):
            execute(plan, tmp_path / "bad", source=source)
        assert not list(tmp_path.iterdir())
        ops["layers.2.mlp.up.weight"] = fresh_op(
            tensor_table(small)["layers.2.mlp.up.weight"], small, dtype="F32", seed=0
        )
        found = run(dataclasses.replace(plan, ops=tuple(ops.values())), tmp_path / "s", source=source)
    assert np.array_equal(found["embed.weight"], arrays["embed.weight"][30:])
    assert np.array_equal(found["head.weight"], found["embed.weight"])
    mean = (arrays[inputs[0]].astype(np.float64) + arrays[inputs[1]]) / 2
    assert np.array_equal(found["layers.1.mlp.up.weight"], mean.astype(np.float32))


def test_manifest_and_dry_run_tell_the_truth(teacher, tmp_path):
    with open_source(teacher) as source:
        plan = plan_inheritance(source, layers=[1])
        done = execute(plan, tmp_path / "s", source=source, record={})
        with open_source(tmp_path / "s") as student:
            assert manifest.hash_source(student) == manifest.load_file(tmp_path / "s" / "manifest.json") == done.hashes
            assert student.tensors["head.weight"].nbytes == 130 * 32 * 4
    for name, size in done.files.items():
        assert (tmp_path / "s" / name).stat().st_size == size
    assert json.loads((tmp_path / "s" / "inherit.json").read_text())["plan"] == json.loads(json.dumps(plan.to_json()))


def test_source_bytes_are_read_once(teacher, tmp_path):
    with open_source(teacher) as source:
        headers = source.pool.bytes_read
        plan = plan_inheritance(source, layers=[0, 2])
        execute(plan, tmp_path / "s", source=source)
        assert source.pool.bytes_read - headers <= 1.02 * plan.weight_bytes + 10


def test_gpt2_transposes_survive_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(movement, "TRANSPOSED_BYTES", 8000)
    monkeypatch.setattr(manifest, "TILE_BYTES", 2000)
    arrays = random_arrays(gpt2())
    folder = write_checkpoint(tmp_path / "t", gpt2(), arrays, "hf")
    with open_source(folder) as source:
        assert_equal(run(plan_conversion(source), tmp_path / "s", source=source), arrays)
        monkeypatch.setattr(manifest, "LARGE_TILE_BYTES", 4000)
        monkeypatch.setattr(manifest, "_TURNED_BYTES", 1000)
        with open_source(tmp_path / "s") as other:
            assert compare(source, other) == []


def test_transposed_tensors_are_read_once_and_moved_in_long_runs(tmp_path, monkeypatch):
    """A tile holds a stripe of every stored row; neither the gaps between stripes nor an element twice is read."""
    monkeypatch.setattr(movement, "TRANSPOSED_BYTES", 1 << 20)
    config = gpt2(num_layers=1, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=32, ffn_size=1024)
    arrays = random_arrays(config)
    folder = write_checkpoint(tmp_path / "t", config, arrays, "hf")
    for number, layout in enumerate((Layout(), Layout(format="megatron"))):
        with open_source(folder) as source:
            headers, plan = source.pool.bytes_read, plan_conversion(source, layout=layout)
            written = execute(plan, tmp_path / str(number), source=source).bytes_written
            assert source.pool.bytes_read - headers <= 1.02 * plan.weight_bytes + 10
            assert written <= 1.02 * plan.weight_bytes + 256 * 1024  # Megatron pads the vocabulary
        with open_source(tmp_path / str(number)) as source:
            assert_equal(read_arrays(source), arrays)


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (513, 65), (64, 64)])
def test_turned_values_are_the_same_values(shape):
    values = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape[::-1]).T
    turned = row_major(values)
    assert turned.flags.c_contiguous
    assert np.array_equal(turned, values)


def test_a_changed_teacher_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "t", llama(), random_arrays(llama()), "hf")
    with open_source(folder) as source:
        plan = plan_conversion(source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="changed since"):
        execute(plan, tmp_path / "s")


def test_existing_output_is_refused_and_overwritten_on_request(teacher, tmp_path):
    with open_source(teacher) as source:
        plan = plan_conversion(source)
        execute(plan, tmp_path / "s", source=source)
        with pytest.raises(UsageError, match="exists already"):
            execute(plan, tmp_path / "s", source=source)
        execute(plan, tmp_path / "s", source=source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("resume", [False, True])
def test_full_disk_is_exit_7_and_leaves_the_teacher_alone(teacher, tmp_path, monkeypatch, resume):
    monkeypatch.setenv("MI_FAULT", "transfer:*:5:full")
    with open_source(teacher) as source, pytest.raises(DiskError, match="full") as error:
        execute(plan_conversion(source), tmp_path / "s", source=source, resume=resume)
    assert error.value.exit_code == 7
    assert not (tmp_path / "s").exists()
    assert [path.name for path in tmp_path.iterdir()] == (["s.tmp-resume"] if resume else [])


@pytest.mark.parametrize("resume", [False, True])
def test_space_is_checked_before_anything_is_written(teacher, tmp_path, monkeypatch, resume):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with open_source(teacher) as source, pytest.raises(DiskError, match="Not enough space"):
        execute(plan_conversion(source), tmp_path / "s", source=source, resume=resume)
    assert not list(tmp_path.iterdir())


def cli(*words, **variables):
    command = [sys.executable, "-m", "megatron_inherit", *map(str, words)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_kill_leaves_nothing_and_resume_finishes_with_the_same_bytes(teacher, tmp_path):
    done = cli("convert", teacher, tmp_path / "s", "--resume", "--threads", 1, MI_FAULT="transfer:*:20:kill")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    journal = tmp_path / "s.tmp-resume" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 21
    shard = next((tmp_path / "s.tmp-resume").glob("model*"))
    with shard.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"torn")
    with open_source(teacher) as source:
        plan = plan_conversion(source)
        moved = execute(plan, tmp_path / "whole", source=source).bytes_written
        rest = execute(plan, tmp_path / "s", source=source, resume=True).bytes_written
    assert 0 < rest < moved / 2 + 20_000
    with open_source(tmp_path / "s") as left, open_source(tmp_path / "whole") as right:
        assert compare(left, right) == []
    assert not (tmp_path / "s" / "journal.jsonl").exists()


@pytest.mark.slow
def test_kill_without_resume_keeps_the_old_student(teacher, tmp_path):
    assert cli("inherit", teacher, tmp_path / "s", "--layers", "first:1").returncode == 0
    before = (tmp_path / "s" / "model.safetensors").read_bytes()
    words = ("inherit", teacher, tmp_path / "s", "--layers", "first:2", "--overwrite")
    assert cli(*words, MI_FAULT="transfer:*:9:kill").returncode == -signal.SIGKILL
    assert (tmp_path / "s" / "model.safetensors").read_bytes() == before
    (left,) = tmp_path.glob("s.tmp-*")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "s", overwrite=True) as living:
        assert not left.exists()
        refused = cli(*words)
        assert refused.returncode == 2
        assert "Another job is writing to" in refused.stderr
        assert living.is_dir()
        raise KeyboardInterrupt
    assert cli(*words).returncode == 0
    assert (tmp_path / "s" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.slow
def test_what_a_killed_command_left_is_removed_with_a_word(teacher, tmp_path):
    words = ("inherit", teacher, tmp_path / "s", "--layers", "first:1")
    assert cli(*words, MI_FAULT="transfer:*:9:kill").returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not (tmp_path / "s").exists()
    done = cli(*words)
    assert done.returncode == 0
    assert f"{left.name} was left by a process that was killed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_another_plan_does_not_continue_a_journal(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MI_FAULT", "transfer:*:5:raise")
    with open_source(teacher) as source:
        with pytest.raises(RuntimeError):
            execute(plan_conversion(source), tmp_path / "s", source=source, resume=True)
        monkeypatch.delenv("MI_FAULT")
        plan = plan_inheritance(source, layers=[0])
        execute(plan, tmp_path / "s", source=source, resume=True)
    with open_source(tmp_path / "s") as student:
        assert student.config.num_layers == 1


def test_a_fresh_model_is_the_same_for_a_seed(tmp_path):
    first, again = (run(plan_fresh(llama(), seed=1), tmp_path / name) for name in "ab")
    other = run(plan_fresh(llama(), seed=2), tmp_path / "c")
    assert_equal(again, first)
    assert not np.array_equal(other["embed.weight"], first["embed.weight"])


def test_mixed_types_keep_their_own_and_fused_ones_must_agree(tmp_path):
    plan = plan_fresh(gpt2(), layout=Layout())
    ops = [dataclasses.replace(op, dtype="BF16") if op.target.endswith("q.weight") else op for op in plan.ops]
    with pytest.raises(CheckpointError, match=r"different dtypes.*--dtype"):
        execute(dataclasses.replace(plan, ops=tuple(ops)), tmp_path / "s")


def test_a_teacher_that_was_replaced_does_not_continue_a_journal(tmp_path, monkeypatch):
    """Its headers and sizes are the same; what was copied before must not stay among what is copied now."""
    options = {"resume": True, "threads": 1}
    teacher = write_checkpoint(tmp_path / "t", llama(), random_arrays(llama(), seed=1), "hf")
    monkeypatch.setenv("MI_FAULT", "transfer:*:20:raise")
    with open_source(teacher) as source, pytest.raises(RuntimeError):
        execute(plan_conversion(source), tmp_path / "s", source=source, **options)
    monkeypatch.delenv("MI_FAULT")
    (teacher / "model.safetensors").unlink()
    write_checkpoint(teacher, llama(), random_arrays(llama(), seed=2), "hf")
    with open_source(teacher) as source:
        found = run(plan_conversion(source), tmp_path / "s", source=source, **options)
    assert_equal(found, random_arrays(llama(), seed=2))


def test_a_torn_replica_is_written_again(teacher, arrays, tmp_path, monkeypatch):
    """A reader sees the norms of one tensor-parallel rank; those of another may be lost with the machine."""
    layout = Layout(format="megatron", tp=2)
    file = "release/mp_rank_00/model_optim_rng.pt"
    with open_source(teacher) as source:
        plan = plan_conversion(source, layout=layout)
        execute(plan, tmp_path / "whole", source=source)
        monkeypatch.setenv("MI_FAULT", "transfer:*:20:raise")
        with pytest.raises(RuntimeError):
            execute(plan, tmp_path / "s", source=source, resume=True, threads=1)
        monkeypatch.delenv("MI_FAULT")
        norm = plan_sink(plan).tensors["layers.0.attn_norm.weight"]
        (place,) = [piece.extent for piece in norm.pieces if piece.extent.file == file]
        with (tmp_path / "s.tmp-resume" / file).open("r+b") as torn:
            torn.seek(place.offset)
            torn.write(bytes(place.nbytes))
        execute(plan, tmp_path / "s", source=source, resume=True)
    assert (tmp_path / "s" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
