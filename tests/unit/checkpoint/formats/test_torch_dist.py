"""torch_dist: both key layouts, any cut, links instead of copies, refusals. Megatron-Core itself is asked in
tests/distributed/test_megatron_core_formats.py."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint import detect
from megatron_inherit.checkpoint.formats import torch_dist
from megatron_inherit.checkpoint.formats.dcp_metadata import read_metadata, write_metadata
from megatron_inherit.checkpoint.formats.torch_dist_link import link_checkpoint, plan_links
from megatron_inherit.cli.main import main
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import (
    FAMILIES,
    assert_equal,
    llama,
    numbered_arrays,
    random_arrays,
    read_arrays,
    write_checkpoint,
)
from tests.unit.checkpoint.formats.test_megatron_legacy import pack

open_source = torch_dist.open_source


@pytest.mark.parametrize("dialect", ["homogeneous", "global"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family(tmp_path, family, dialect):
    config = FAMILIES[family]
    arrays = random_arrays(config, dtype="BF16")
    write_checkpoint(tmp_path, config, arrays, "torch_dist", dtype="BF16", tp=2, pp=2, dialect=dialect, iteration=3)
    assert torch_dist.detect(str(tmp_path))
    with open_source(str(tmp_path)) as source:
        assert_equal(read_arrays(source), arrays)
        assert source.config == config
        assert source.details["iteration"] == 3
        box = source.read("layers.2.attn.k.weight", (slice(3, 7), slice(1, 9)))
        np.testing.assert_array_equal(box.array(), arrays["layers.2.attn.k.weight"][3:7, 1:9])


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_cut_does_not_matter(tmp_path, data):
    config = llama(num_layers=4, vocab_size=data.draw(st.integers(3, 200)), tied=data.draw(st.booleans()))
    arrays = numbered_arrays(config)
    for step in range(2):
        folder = tmp_path / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        tp, pp = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.sampled_from([1, 2, 4]))
        dialect = data.draw(st.sampled_from(["homogeneous", "global"]))
        write_checkpoint(folder, config, arrays, "torch_dist", tp=tp, pp=pp, dialect=dialect)
        assert_equal(read_arrays(open_source(str(folder))), arrays)


def test_torch_reads_what_we_write(tmp_path):
    """The global tensors, through torch's own loader: packed queries, gates before ups, layers stacked, padding."""
    config = llama()
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path, config, arrays, "torch_dist", tp=2, pp=2)
    key = "decoder.layers.{}.weight"
    found = {
        "embedding.word_embeddings.weight": torch.ones(256, 32),
        key.format("self_attention.linear_qkv"): torch.empty(4, 48, 32),
        key.format("mlp.linear_fc1"): torch.empty(4, 96, 32),
        key.format("self_attention.linear_proj"): torch.empty(4, 32, 32),
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "release"), no_dist=True)
    values = [value.numpy() for value in found.values()]
    np.testing.assert_array_equal(values[0][:130], arrays["embed.weight"])
    assert not values[0][130:].any()
    for layer in range(4):
        np.testing.assert_array_equal(values[1][layer], pack(arrays, config, layer))
        both = [arrays[f"layers.{layer}.mlp.{part}.weight"] for part in ("gate", "up")]
        np.testing.assert_array_equal(values[2][layer], np.concatenate(both))
        np.testing.assert_array_equal(values[3][layer], arrays[f"layers.{layer}.attn.o.weight"])


def test_every_blob_is_a_sound_archive(tmp_path):
    config = llama(num_layers=1)
    write_checkpoint(tmp_path, config, random_arrays(config), "torch_dist", tp=2)
    metadata = dcp.FileSystemReader(tmp_path / "release").read_metadata()
    for info in metadata.storage_data.values():
        part = tmp_path / "blob"
        with (tmp_path / "release" / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            part.write_bytes(file.read(info.length))
        assert zipfile.ZipFile(part).testzip() is None
        torch.load(part, weights_only=True)


def tree(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sources_of(config, layers):
    names = {}
    for name in random_arrays(config.with_layers(len(layers))):
        head, _, rest = name.partition(".")
        if head == "layers":
            layer, _, rest = rest.partition(".")
            names[name] = f"layers.{layers[int(layer)]}.{rest}"
        else:
            names[name] = name
    return names


@pytest.mark.parametrize("dialect", ["homogeneous", "global"])
@pytest.mark.parametrize("layers", [[0, 1], [3, 0], [2, 2, 0, 1, 1]])
def test_links_give_the_student_without_moving_a_byte(tmp_path, dialect, layers):
    """Check 14."""
    config = llama()
    arrays = numbered_arrays(config)
    teacher = write_checkpoint(tmp_path / "teacher", config, arrays, "torch_dist", tp=2, pp=2, dialect=dialect)
    before = tree(teacher)
    (tmp_path / "student").mkdir()
    student = config.with_layers(len(layers))
    sources = sources_of(config, layers)
    linked = link_checkpoint(plan_links(open_source(str(teacher)), student, sources, iteration=9), tmp_path / "student")
    assert linked.bytes_written < 100_000
    assert not linked.copied
    assert tree(teacher) == before
    for file in linked.files:
        assert os.path.samefile(tmp_path / "student" / file, teacher / "release" / file.partition("/")[2])
    with open_source(str(tmp_path / "student")) as source:
        assert source.config == student
        assert_equal(read_arrays(source), {name: arrays[origin] for name, origin in sources.items()})
    loaded = dcp.FileSystemReader(tmp_path / "student" / "iter_0000009").read_metadata()
    states = [key for key in loaded.state_dict_metadata if "_extra_state" in key]
    assert len(states) == 4 * len(layers)


def test_reads_model_shaped_optimizer_state(tmp_path):
    """A checkpoint of fully_reshardable layout, written by torch as Megatron writes it."""
    config = llama(num_layers=2)
    arrays = numbered_arrays(config)
    teacher = write_checkpoint(tmp_path / "teacher", config, arrays, "torch_dist")
    folder = teacher / "release"
    reader = dcp.FileSystemReader(folder)
    state = {
        key: torch.empty(entry.size)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    layered = {}
    for key, tensor in state.items():
        for number, kind in enumerate(("fp32_param", "exp_avg", "exp_avg_sq")):
            layered[f"optimizer.state.{kind}.{key}"] = tensor + number
    objects = {f"decoder.layers.self_attention.linear_qkv._extra_state/shard_{layer}_2": [None] for layer in range(2)}
    for path in folder.glob("*.distcp"):
        path.unlink()
    dcp.save(
        {**state, **layered, **objects},
        storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, overwrite=True),
        no_dist=True,
    )
    with open_source(str(teacher)) as source:
        found = read_arrays(source, optimizer=True)
        for name, values in arrays.items():
            np.testing.assert_array_equal(found[name], values)
            np.testing.assert_array_equal(found[f"fp32:{name}"], values)
            np.testing.assert_array_equal(found[f"exp_avg_sq:{name}"], values + 2)
    weights = {name: name for name in arrays}
    with pytest.raises(CheckpointError, match="several layers"):
        plan_links(open_source(str(teacher)), config, weights)


@pytest.mark.parametrize("dialect", ["homogeneous", "global"])
def test_links_take_optimizer_state_along(tmp_path, dialect):
    config = llama()
    arrays = numbered_arrays(config)
    teacher = write_checkpoint(tmp_path / "teacher", config, arrays, "torch_dist", dialect=dialect)
    metadata = read_metadata(teacher / "release")
    state = {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in metadata.tensors.items()}
    whole = dataclasses.replace(metadata, tensors={**metadata.tensors, **state})
    (teacher / "release" / ".metadata").write_bytes(write_metadata(whole))
    (tmp_path / "student").mkdir()
    common = torch.load(teacher / "release" / "common.pt", weights_only=False)
    group = {"betas": (0.9, 0.95), "lr": 1e-4, "step": torch.tensor(7.0), "wd_mult": 1.0}
    common["optimizer"] = {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "fully_reshardable"}
    common["rng_state"] = "the teacher's"
    torch.save(common, teacher / "release" / "common.pt")
    sources = sources_of(config, [3, 0])
    both = sources | {f"exp_avg:{name}": f"exp_avg:{origin}" for name, origin in sources.items()}
    link_checkpoint(plan_links(open_source(str(teacher)), config.with_layers(2), both), tmp_path / "student")
    with open_source(str(tmp_path / "student")) as source:
        found = read_arrays(source, optimizer=True)
    written = torch.load(tmp_path / "student" / "release" / "common.pt", weights_only=False)
    assert written["optimizer"] == common["optimizer"]
    assert "rng_state" not in written
    assert len(found) == 2 * len(sources)
    for name, origin in sources.items():
        np.testing.assert_array_equal(found[f"exp_avg:{name}"], arrays[origin])


class TestOptimizer:
    """Moments go from a universal checkpoint to torch_dist and back, sliced and cut on the way."""

    @pytest.fixture
    def universal(self, tmp_path):
        arrays = numbered_arrays(llama())
        kinds = enumerate(("fp32", "exp_avg", "exp_avg_sq"), 1)
        state = {f"{kind}:{name}": values + number for number, kind in kinds for name, values in arrays.items()}
        options = {"optimizer": True, "iteration": 7, "adam": (0.9, 0.95, 1e-8)}
        return write_checkpoint(tmp_path / "universal", llama(), arrays | state, "ds_universal", **options)

    @pytest.mark.parametrize("dialect", ["homogeneous", "global"])
    def test_there_and_back(self, universal, tmp_path, dialect):
        layout = Layout(format="torch_dist", tp=4, pp=2, dialect=dialect)
        with detect.open_source(universal) as source:
            expected = read_arrays(source, optimizer=True)
            execute(plan_conversion(source, layout=layout, optimizer=True), tmp_path / "megatron", source=source)
        with open_source(str(tmp_path / "megatron")) as source:
            found = read_arrays(source, optimizer=True)
            assert_equal(dict(sorted(found.items())), dict(sorted(expected.items())))
            plan = plan_conversion(source, layout=Layout(format="ds_universal"), optimizer=True)
            execute(plan, tmp_path / "back", source=source)
        for path in sorted(universal.rglob("*.pt")):
            assert (tmp_path / "back" / path.relative_to(universal)).read_bytes() == path.read_bytes(), path

    def test_slices_take_their_state_along(self, universal, tmp_path):
        with detect.open_source(universal) as source:
            teacher = read_arrays(source, optimizer=True)
            layout = Layout(format="torch_dist", tp=2)
            plan = plan_inheritance(source, layers=[3, 0], reset=["final_norm"], layout=layout, optimizer=True)
            execute(plan, tmp_path / "student", source=source)
        with open_source(str(tmp_path / "student")) as source:
            found = read_arrays(source, optimizer=True)
            assert source.details["iteration"] == 7
        key = "exp_avg_sq:layers.{}.mlp.down.weight"
        np.testing.assert_array_equal(found[key.format(0)], teacher[key.format(3)])
        assert (found["fp32:final_norm.weight"] == 1).all()
        assert not found["exp_avg:final_norm.weight"].any()
        common = torch.load(tmp_path / "student" / "iter_0000007" / "common.pt", weights_only=False)
        groups = common["optimizer"]["optimizer"]["param_groups"]
        assert [(group["wd_mult"], group["betas"], group["step"]) for group in groups] == [
            (1.0, (0.9, 0.95), 7),
            (0.0, (0.9, 0.95), 7),
        ]

    def test_the_number_of_updates_is_the_optimizers(self, universal, tmp_path, capsys):
        """Iterations that were skipped are no updates; another number would change Adam's bias correction."""
        words = ["--format", "torch_dist", "--optimizer", "keep"]
        assert main(["convert", str(universal), str(tmp_path / "no"), *words, "--iteration", "9"]) == 2
        assert "the number of updates behind the moments" in capsys.readouterr().err
        assert main(["convert", str(universal), str(tmp_path / "core"), *words, "--iteration", "7"]) == 0
        path = tmp_path / "core" / "iter_0000007" / "common.pt"
        torch.save(torch.load(path, weights_only=False) | {"iteration": 12}, path)
        with open_source(str(tmp_path / "core")) as source:
            assert plan_conversion(source, layout=Layout(format="ds_universal"), optimizer=True).layout.iteration == 7

    def test_state_of_other_parameters_is_refused(self, universal):
        """Where layers have something of their own, masters and moments are those of what is folded together."""
        with detect.open_source(universal) as source:
            own = {"sws.layers.0.gate.attn": source.tensors["final_norm.weight"]}
            folded = dataclasses.replace(source, own=own)
            assert plan_conversion(folded)
            with pytest.raises(CheckpointError, match="shared stages and of what layers have beside them"):
                plan_conversion(folded, layout=Layout(format="ds_universal"), optimizer=True)

    @pytest.mark.parametrize("format", ["hf", "meta", "megatron"])
    def test_formats_of_weights_alone_are_refused(self, universal, tmp_path, format, capsys):
        words = ["convert", str(universal), str(tmp_path / "out"), "--format", format, "--optimizer", "keep"]
        assert main(words) == 2
        assert f"The format {format} holds weights only" in capsys.readouterr().err

    def test_unknown_settings_of_adam_are_refused(self, universal, tmp_path):
        states = torch.load(universal / "global_step7" / "mp_rank_00_model_states.pt", weights_only=False)
        torch.save(states | {"ds_config": {}}, universal / "global_step7" / "mp_rank_00_model_states.pt")
        with detect.open_source(universal) as source:
            plan = plan_conversion(source, layout=Layout(format="torch_dist"), optimizer=True)
            with pytest.raises(CheckpointError, match="Adam's betas"):
                execute(plan, tmp_path / "out", source=source)
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        config = llama(num_layers=2)
        return write_checkpoint(tmp_path / "run", config, random_arrays(config), "torch_dist", iteration=4)

    def refused(self, folder, *parts):
        with pytest.raises(CheckpointError) as refusal:
            read_arrays(open_source(str(folder)))
        for part in parts:
            assert part in str(refusal.value)

    def test_code_in_the_metadata(self, folder, tmp_path):
        marker = tmp_path / "marker"

        class Evil:
            def __reduce__(self):
                return (os.system, (f"touch {marker}",))

        (folder / "iter_0000004" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
        self.refused(folder, ".metadata", "system")
        assert not marker.exists()

    @pytest.mark.parametrize("name", [".metadata", "metadata.json"])
    def test_an_unfinished_save(self, folder, name):
        (folder / "iter_0000004" / name).unlink()
        self.refused(folder, name, "not finished")

    def test_another_backend(self, folder):
        (folder / "iter_0000004" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
        self.refused(folder, "zarr", "torch_dist")

    def test_a_missing_file(self, folder):
        (folder / "iter_0000004" / "__0_0.distcp").unlink()
        self.refused(folder, "__0_0.distcp", "missing")

    def test_a_truncated_file(self, folder):
        path = folder / "iter_0000004" / "__0_0.distcp"
        os.truncate(path, path.stat().st_size - 1)
        self.refused(folder, "__0_0.distcp", "truncated")

    def test_a_damaged_blob(self, folder):
        path = folder / "iter_0000004" / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        data[data.find(b"PK\x05\x06")] = 0
        path.write_bytes(data)
        self.refused(folder, "__0_0.distcp", "zip directory")

    def test_a_path_outside_the_folder(self, folder):
        path = folder / "iter_0000004" / ".metadata"
        path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../0_0.distc"))
        self.refused(folder, "outside its folder")

    def test_an_unknown_and_a_missing_name(self, folder):
        path = folder / "iter_0000004" / ".metadata"
        path.write_bytes(path.read_bytes().replace(b"linear_proj.weight", b"linear_projection"[:18].ljust(18, b"x")))
        self.refused(folder, "linear_proj.weight", "missing")

    def test_a_flat_optimizer_is_named_with_its_remedy(self, folder):
        reader = dcp.FileSystemReader(folder / "iter_0000004")
        metadata = reader.read_metadata()
        entry = next(entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "chunks"))
        key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"
        index = next(index for index in metadata.storage_data if index.offset is not None)
        metadata.state_dict_metadata[key] = entry
        for chunk in entry.chunks:
            new = dcp.metadata.MetadataIndex(key, chunk.offsets)
            metadata.storage_data[new] = metadata.storage_data[index]
        (folder / "iter_0000004" / ".metadata").write_bytes(pickle.dumps(metadata))
        with open_source(str(folder)) as source:
            assert "--dist-ckpt-optim-fully-reshardable" in source.details["optimizer_note"]
            assert not source.optimizer
            read_arrays(source)
            with pytest.raises(CheckpointError, match="--dist-ckpt-optim-fully-reshardable"):
                plan_conversion(source, optimizer=True)
