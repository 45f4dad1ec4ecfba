"""ZeRO partitions written by hand: every cut a real run could make, and ones that it makes rarely; refusals."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats import ds_universal, ds_zero, hf
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.checkpoint.layout import physical_tensors
from tests.support.checkpoints import FAMILIES, assert_equal, llama, numbered_arrays, read_arrays, write_checkpoint

CONFIG = llama(num_layers=2, vocab_size=37, hidden_size=12, ffn_size=10)


def parameters(config, arrays):
    """Gives the whole parameters under Hugging Face names (GPT-2's transposed and fused ones included)."""
    named = {}
    for tensor in physical_tensors(hf.ROWS[config.family], config):
        parts = np.concatenate([arrays[part.name] for part in tensor.parts])
        named[tensor.name] = torch.from_numpy(np.ascontiguousarray(parts.T if tensor.row.transpose else parts))
    return named


def save_zero(folder, config, arrays, *, stage, world, groups, cuts=()):
    """Saves partitions as DeepSpeed does; ``cuts`` moves the borders between ZeRO-3's flat groups."""
    save_partitions(folder, parameters(config, arrays), stage=stage, world=world, groups=groups, cuts=cuts)
    (folder / "config.json").write_text(json.dumps(write_config(config, "F32")))
    return folder


def save_partitions(folder, named, *, stage, world, groups, cuts=(), mp=0, **states):
    tag = folder / "global_step7"
    tag.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text("global_step7")
    shapes = [{name: tuple(named[name].shape) for name in group} for group in groups]
    for rank in range(world):
        parts = [partition(named, group, stage, world, rank) for group in groups]
        if cuts:
            joined = torch.cat(parts)
            parts = list(torch.tensor_split(joined, sorted(cut % len(joined) for cut in cuts)))
        moments = {
            number: {"step": torch.tensor(7.0), "exp_avg": part + 0.5, "exp_avg_sq": part + 0.25}
            for number, part in enumerate(parts)
        }
        weights = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        base = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        state = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world] * len(groups),
            base: {"state": moments, "param_groups": []},
            weights: parts,
        }
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt")
        name = f"zero_pp_rank_{rank}_mp_rank_{mp:02d}" if stage == 3 else f"mp_rank_{mp:02d}"
        model = {"param_shapes": shapes, "global_steps": 7, "shared_params": {}, "frozen_param_shapes": None}
        torch.save({**model, **states}, tag / f"{name}_model_states.pt")


def partition(named, group, stage, world, rank):
    if stage == 3:
        parts = []
        for name in group:
            flat = named[name].flatten()
            size = math.ceil(flat.numel() / world)
            part = flat[rank * size : (rank + 1) * size]
            parts.append(torch.nn.functional.pad(part, (0, size - part.numel())))
        return torch.cat(parts)
    flat = torch.cat([named[name].flatten() for name in group])
    size = math.ceil(flat.numel() / (2 * world)) * 2  # DeepSpeed aligns to 2 x ranks, then saves without the padding
    return flat[rank * size : (rank + 1) * size].clone()


def check(folder, arrays):
    with ds_zero.open_source(str(folder)) as source:
        found = read_arrays(source, optimizer=True)
        assert source.details["optimizer_step"] == 7
    assert_equal({name: found[name] for name in arrays}, arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[f"fp32:{name}"], values)
        np.testing.assert_array_equal(found[f"exp_avg:{name}"], values + np.float32(0.5))
        np.testing.assert_array_equal(found[f"exp_avg_sq:{name}"], values + np.float32(0.25))


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_partition_reads_back(tmp_path, data):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    stage, world = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 7))
    names = data.draw(st.permutations(list(parameters(CONFIG, numbered_arrays(CONFIG)))))
    border = data.draw(st.integers(1, len(names) - 1))
    groups = [names[:border], names[border:]]
    cuts = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=4)) if stage == 3 else ()
    arrays = numbered_arrays(CONFIG)
    check(save_zero(tmp_path / "run", CONFIG, arrays, stage=stage, world=world, groups=groups, cuts=cuts), arrays)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_stage_is_read_by_its_name_too(tmp_path, monkeypatch, number):
    """As Python 3.11.2 pickles it, Debian's."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    by_name = lambda self, protocol: (getattr, (type(self), self._name_))  # noqa: E731
    monkeypatch.setattr(config.ZeroStageEnum, "__reduce_ex__", by_name)
    arrays, stage = numbered_arrays(CONFIG), config.ZeroStageEnum(number)
    groups = [list(parameters(CONFIG, arrays))]
    check(save_zero(tmp_path / "run", CONFIG, arrays, stage=stage, world=2, groups=groups), arrays)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [2, 3])
def test_every_family(tmp_path, family, stage):
    config = dataclasses.replace(FAMILIES[family], num_layers=2)
    arrays = numbered_arrays(config)
    groups = [list(parameters(config, arrays))]
    check(save_zero(tmp_path / "run", config, arrays, stage=stage, world=3, groups=groups), arrays)


class TestRefusals:
    @pytest.fixture(params=[2, 3])
    def folder(self, request, tmp_path):
        arrays = numbered_arrays(CONFIG)
        groups = [list(parameters(CONFIG, arrays))]
        return save_zero(tmp_path / "run", CONFIG, arrays, stage=request.param, world=3, groups=groups)

    def refused(self, folder, *parts):
        with pytest.raises(CheckpointError) as refusal:
            ds_zero.open_source(str(folder))
        for part in parts:
            assert part in str(refusal.value)

    def edit(self, path, change):
        value = torch.load(path, weights_only=False)
        change(value)
        torch.save(value, path)

    def test_missing_rank(self, folder):
        (folder / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
        self.refused(folder, "rank 1")

    def test_missing_last_rank(self, folder):
        (folder / "global_step7" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
        self.refused(folder, "written by 3", "2 files")

    def test_one_rank_of_two_runs(self, folder):
        name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        shutil.copyfile(folder / "global_step7" / name, folder / "global_step7" / f"bf16_{name}")
        self.refused(folder, "are the same rank", f"bf16_{name}", name)

    def test_mixed_steps(self, folder):
        def later(value):
            for base in ("optimizer_state_dict", "base_optimizer_state"):
                for state in value["optimizer_state_dict"].get(base, {}).get("state", {}).values():
                    state["step"] = torch.tensor(8.0)

        self.edit(folder / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", later)
        self.refused(folder, "zero_pp_rank_1", "step 8")

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        self.refused(folder, "config.json", "which model")

    def test_unknown_names(self, folder):
        for path in (folder / "global_step7").glob("*model_states.pt"):
            self.edit(path, lambda value: value["param_shapes"][0].update(extra=(0,)))
        self.refused(folder, "extra")

    def test_frozen_parameters(self, folder):
        for path in (folder / "global_step7").glob("*model_states.pt"):
            self.edit(path, lambda value: value.update(frozen_param_shapes={"a": (1,)}))
        self.refused(folder, "frozen")

    def test_moments_that_are_shorter_than_the_weights(self, folder):
        def cut(value):
            state = value["optimizer_state_dict"]
            group = (state.get("base_optimizer_state") or state["optimizer_state_dict"])["state"][0]
            group["exp_avg"] = group["exp_avg"][:-2].clone()

        self.edit(folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", cut)
        self.refused(folder, "zero_pp_rank_0", "exp_avg does not fit the fp32 weights")

    def test_partitions_that_are_too_short(self, folder):
        def cut(value):
            for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
                if key in value["optimizer_state_dict"]:
                    parts = value["optimizer_state_dict"][key]
                    parts[0] = parts[0][:-20].clone()

        self.edit(folder / "global_step7" / "zero_pp_rank_2_mp_rank_00_optim_states.pt", cut)
        self.refused(folder, "do not hold all of")


@pytest.mark.parametrize("form", ["dictionary", "bare"])
def test_both_forms_of_universal_files(tmp_path, form):
    """``ds_to_universal`` writes bare flat tensors for ZeRO-3 and dictionaries else."""
    arrays = numbered_arrays(CONFIG)
    for name, tensor in parameters(CONFIG, arrays).items():
        folder = tmp_path / "zero" / name
        folder.mkdir(parents=True)
        for number, kind in enumerate(("fp32", "exp_avg", "exp_avg_sq")):
            value = tensor + number
            torch.save(
                {"param": value, "cat_dim": 0} if form == "dictionary" else value.flatten(), folder / f"{kind}.pt"
            )
        torch.save(torch.tensor(9.0), folder / "step.pt")
    (tmp_path / "config.json").write_text(json.dumps(write_config(CONFIG, "F32")))
    with ds_universal.open_source(str(tmp_path)) as source:
        found = read_arrays(source, optimizer=True)
        assert source.details["optimizer_step"] == 9
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
        np.testing.assert_array_equal(found[f"exp_avg_sq:{name}"], values + 2)


@pytest.mark.parametrize(
    ("family", "dialect"), [*((family, "hf") for family in FAMILIES), ("llama", "local"), ("gpt2", "legacy")]
)
def test_universal_round_trip(tmp_path, family, dialect):
    config = dataclasses.replace(FAMILIES[family], num_layers=2)
    arrays = numbered_arrays(config)
    state = {
        f"{kind}:{name}": values + 1 for name, values in arrays.items() for kind in ("fp32", "exp_avg", "exp_avg_sq")
    }
    options = {"dialect": dialect, "optimizer": True, "iteration": 5}
    write_checkpoint(tmp_path, config, {**arrays, **state}, "ds_universal", **options)
    with ds_universal.open_source(str(tmp_path)) as source:
        found = read_arrays(source, optimizer=True)
        assert source.config == config
        assert source.details["optimizer_step"] == 5
    assert_equal({key: found[key] for key in state}, state)


def test_universal_weights_must_be_fp32(tmp_path):
    arrays = numbered_arrays(CONFIG)
    with pytest.raises(CheckpointError, match="--dtype fp32"):
        write_checkpoint(tmp_path / "out", CONFIG, arrays, "ds_universal", dtype="BF16")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_of_a_pipeline_are_understood(tmp_path, family):
    """Megatron-DeepSpeed's GPTModelPipe: numbers of the pipeline's layers, here 1 the embedding, 3 and 4 blocks."""
    config = dataclasses.replace(FAMILIES[family], num_layers=2)
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path, config, arrays, "ds_universal", dialect="legacy_layernorm")
    for folder in (tmp_path / "global_step0" / "zero").iterdir():
        name = folder.name.replace("language_model.embedding.", "1.")
        name = re.sub(r"language_model\.encoder\.layers\.(\d+)\.", lambda match: f"{int(match[1]) + 3}.", name)
        name = name.replace("language_model.encoder.final_layernorm.", "6.")
        folder.rename(folder.parent / name.replace("language_model.output_layer.", "7.lm_head."))
    with ds_universal.open_source(str(tmp_path)) as source:
        assert_equal(read_arrays(source), arrays)


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_parallel_ranks_of_megatron_deepspeed(tmp_path, stage):
    """TP 2 x DP 3: every rank's [gate; up], query groups and padded vocabulary, in flat partitions."""
    config = llama(num_layers=2)
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path / "megatron", config, arrays, "megatron", tp=2, dialect="legacy_layernorm")
    for mp in range(2):
        path = tmp_path / "megatron" / "release" / f"mp_rank_{mp:02d}" / "model_optim_rng.pt"
        value = torch.load(path, weights_only=False)
        named = flatten(value["model"])
        save_partitions(tmp_path / "run", named, stage=stage, world=3, groups=[list(named)], mp=mp, args=value["args"])
    check(tmp_path / "run", arrays)


def flatten(value, prefix=""):
    if isinstance(value, dict):
        return {
            name: tensor for key, item in value.items() for name, tensor in flatten(item, f"{prefix}{key}.").items()
        }
    return {prefix[:-1]: value}
