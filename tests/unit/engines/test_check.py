"""Options that cannot work are refused with what would do."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.engines.check import check_batch, check_options
from megatron_inherit.sharing.regularise import SoftTie
from megatron_inherit.sharing.stage_plan import parse_plan

LLAMA = preset("llama-tiny")  # 4 layers, 4 heads, 2 groups

REFUSED = {
    "zero2-pp": ("deepspeed", {"zero_stage": 2, "pp": 2}, "ZeRO-2/3 and pipelines exclude each other"),
    "zero3-pp": ("deepspeed", {"zero_stage": 3, "pp": 2}, "ZeRO-2/3 and pipelines exclude each other"),
    "zero1-pp": ("deepspeed", {"zero_stage": 1, "pp": 2}, "engine=megatron"),
    "zero0-bf16": ("deepspeed", {"zero_stage": 0, "dtype": "bf16"}, "deepspeed.zero_stage=1"),
    "zero4": ("deepspeed", {"zero_stage": 4}, "0, 1, 2 or 3"),
    "offload-zero0": ("deepspeed", {"zero_stage": 0, "offload": "optimizer"}, "needs ZeRO"),
    "offload-all-zero2": ("deepspeed", {"zero_stage": 2, "offload": "all"}, "it needs ZeRO-3"),
    "nvme-zero2": ("deepspeed", {"zero_stage": 2, "offload": "optimizer", "nvme_path": "/x"}, "deepspeed.zero_stage=3"),
    "nvme-alone": ("deepspeed", {"zero_stage": 3, "nvme_path": "/x"}, "deepspeed.offload=optimizer or all"),
    "deepspeed-cp": ("deepspeed", {"cp": 2}, "context parallelism"),
    "megatron-offload": ("megatron", {"offload": "optimizer"}, "does not offload"),
    "tp-groups": ("megatron", {"tp": 4}, "parallel.tp: 4 does not divide the 2 key/value groups"),
    "world": ("megatron", {"tp": 2, "pp": 4}, "a multiple of 8 processes"),
    "sp-without-tp": ("megatron", {"sequence_parallel": True}, "needs tensor parallelism"),
    "pp-layers": ("megatron", {"pp": 3}, "parallel.pp: 4 blocks do not split"),
    "vpp-layers": ("megatron", {"pp": 2, "vpp": 4}, "pp x vpp among"),
    "vpp-without-pp": ("megatron", {"vpp": 2}, "needs a pipeline"),
    "uneven": ("megatron", {"pp": 2, "first_stage_layers": 3, "last_stage_layers": 2}, "do not split over"),
    "uneven-vpp": ("megatron", {"pp": 2, "vpp": 2, "first_stage_layers": 3}, "need pp >= 2 and vpp = 1"),
    "gather-without-reduce": ("megatron", {"overlap_param_gather": True}, "needs megatron.distributed_optimizer"),
    "betas": ("megatron", {"betas": (0.9, 1.0)}, "both betas"),
    "tp0": ("megatron", {"tp": 0}, "at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, options, message = REFUSED[name]
    world = {"pp-layers": 3, "tp-groups": 4}.get(name, 2 if name != "tp0" else 1)
    with pytest.raises(ConfigError) as error:
        check_options(kind, EngineOptions(**options), LLAMA, world_size=world)
    assert message in str(error.value)
    assert re.match(r"(parallel|deepspeed|megatron|optimizer|train|sharing)[.:]", str(error.value)), "no key path"
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("kind", "options", "world"),
    [
        ("megatron", {}, 1),
        ("megatron", {"tp": 2, "pp": 2, "sequence_parallel": True}, 8),
        ("megatron", {"pp": 2, "vpp": 2}, 2),
        ("megatron", {"pp": 2, "first_stage_layers": 1, "last_stage_layers": 3}, 2),
        ("deepspeed", {"zero_stage": 3, "tp": 2, "dtype": "bf16", "offload": "all"}, 4),
    ],
)
def test_accepted(kind, options, world):
    check_options(kind, EngineOptions(**options), LLAMA, world_size=world)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("2,2", {"pp": 2}),
        ("ids:0,1,0,1", {"pp": 2, "vpp": 2}),
        ("1,3", {"pp": 2, "first_stage_layers": 1, "last_stage_layers": 3}),
        ("1,3", {"pp": 2, "last_stage_layers": 3}),
    ],
)
def test_a_soft_tie_may_be_cut_between_its_stages(plan, options):
    tie = SoftTie(plan=parse_plan(plan), weight=0.1)
    check_options("megatron", EngineOptions(**options, soft_tie=tie), LLAMA, world_size=2)


@pytest.mark.parametrize(
    ("plan", "kind", "options", "words"),
    [
        ("4", "l2", {"pp": 2}, "several pipeline ranks"),
        ("2,2", "l2", {"pp": 2, "vpp": 2}, "several pipeline ranks"),
        ("2,2", "l2", {"pp": 2, "first_stage_layers": 1, "last_stage_layers": 3}, "several pipeline ranks"),
        ("2,2", "l2", {"pp": 2, "first_stage_layers": 3}, "several pipeline ranks"),
        ("3,2", "l2", {}, "does not cover"),
        ("2,2", "group_lasso", {"tp": 2}, "whole matrices"),
    ],
)
def test_a_soft_tie_that_is_cut_elsewhere_is_refused(plan, kind, options, words):
    tie = SoftTie(plan=parse_plan(plan), weight=0.1, kind=kind)
    with pytest.raises(ConfigError, match=words):
        check_options("megatron", EngineOptions(**options, soft_tie=tie), LLAMA, world_size=2)


def test_gpt2_heads_are_its_groups():
    with pytest.raises(ConfigError, match="attention heads"):
        check_options(
            "megatron", EngineOptions(tp=8), dataclasses.replace(preset("gpt2-tiny"), ffn_size=256), world_size=8
        )


@pytest.mark.parametrize(
    ("options", "batch", "length", "world", "message"),
    [
        ({"micro_batch": 3}, 8, 16, 1, "6 or 9"),
        ({"micro_batch": 2}, 6, 16, 2, "4 or 8"),
        ({"micro_batch": 1, "pp": 2, "vpp": 2}, 3, 16, 2, "a multiple of 2"),
        ({"cp": 2}, 4, 18, 2, "16 or 20"),
        ({"tp": 2, "sequence_parallel": True}, 4, 17, 2, "16 or 18"),
    ],
)
def test_batches_that_do_not_split(options, batch, length, world, message):
    with pytest.raises(ConfigError, match=rf"^train\.(global_batch|sequence_length): .*{message}"):
        check_batch(EngineOptions(**options), global_batch=batch, sequence_length=length, world_size=world)


def test_batch_that_splits():
    check_batch(EngineOptions(micro_batch=2, pp=2, vpp=2, cp=2), global_batch=16, sequence_length=16, world_size=8)
