"""Megatron-Core is the oracle: it loads what we write, strictly, and we read what it writes (checks 8, 9, 10)."""

import dataclasses

import pytest
import torch

from megatron_inherit.checkpoint.formats import torch_dist
from megatron_inherit.checkpoint.formats.torch_dist_link import link_checkpoint, plan_links
from tests.support.checkpoints import (
    assert_equal,
    gpt2,
    llama,
    random_arrays,
    read_arrays,
    write_checkpoint,
)
from tests.support.core_world import run_world
from tests.unit.checkpoint.formats.test_megatron_legacy import megatron_args
from tests.unit.checkpoint.formats.test_torch_dist import sources_of

pytestmark = pytest.mark.timeout(1800)
CONFIGS = {
    "llama": llama(num_heads=8, num_kv_heads=2, head_dim=4),
    "mistral": llama(family="mistral", num_kv_heads=4, sliding_window=32),
    "qwen2": llama(family="qwen2", qkv_bias=True),
    "qwen3": llama(family="qwen3", qk_norm=True, head_dim=8, tied=True),
    "gpt2": gpt2(),
}
TOKENS = torch.randint(0, 130, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
LOADS = [("llama", "homogeneous", 2, 2), ("llama", "global", 2, 2), ("llama", "linked", 2, 2)]
LOADS += [("qwen3", "homogeneous", 2, 2), ("gpt2", "homogeneous", 2, 2), ("gpt2", "global", 1, 1)]
LOADS += [(family, "homogeneous", tp, 1) for family in CONFIGS for tp in (1, 2)]
LOADS += [("llama", "optimizer", 2, 2), ("llama", "optimizer", 2, 1), ("gpt2", "optimizer", 1, 2)]
LINKED = (3, 0)  # the student's layers; its checkpoint is links to the homogeneous one
SAVES = [("llama", "homogeneous"), ("llama", "global")]


def with_state(arrays):
    """Optimizer state that tells which weight it belongs to."""
    kinds = {"fp32": 0, "exp_avg": 1, "exp_avg_sq": 2}
    return {f"{kind}:{name}": values + number for kind, number in kinds.items() for name, values in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Loads every case in one world of four processes: TP1 and TP2 (with replicas) and TP2 x PP2; saves some."""
    folder = tmp_path_factory.mktemp("core")
    cases = []
    for family, dialect, tp, pp in LOADS:
        config, arrays = CONFIGS[family], random_arrays(CONFIGS[family])
        written, legacy = folder / f"{family}.{dialect}", folder / f"{family}.legacy.{tp}.{pp}"
        if dialect == "linked":
            sources = sources_of(config, LINKED)
            config, arrays = config.with_layers(2), {name: arrays[origin] for name, origin in sources.items()}
            legacy = folder / "linked.legacy"
            written.mkdir()
            teacher = torch_dist.open_source(str(folder / f"{family}.homogeneous"))
            link_checkpoint(plan_links(teacher, config, sources), written)
        if dialect == "optimizer":  # no padding, whose moments are zeros
            config = dataclasses.replace(config, vocab_size=256)
            arrays = random_arrays(config)
            legacy = folder / f"{family}.optimizer.legacy.{tp}.{pp}"
        if not legacy.exists():
            write_checkpoint(legacy, config, arrays, "megatron", tp=tp, pp=pp, dialect="local")
        if not written.exists():  # padded to 256 rows whatever the number of shards; Megatron loads it at any
            cut = 2 if dialect == "global" else 1
            layout = {"tp": cut, "vocab_multiple": 256 // cut, "dialect": dialect}
            if dialect == "optimizer":
                layout |= {"dialect": "", "optimizer": True, "iteration": 7, "adam": (0.8, 0.9, 1e-6)}
                arrays |= with_state(arrays)
            write_checkpoint(written, config, arrays, "torch_dist", **layout)
        save = folder / f"{family}.core.{dialect}"
        saved = pp == 2 and (family, dialect) in SAVES
        if saved:
            save.mkdir()
        args = vars(megatron_args(config, 2, 2, qk_layernorm=config.qk_norm))
        cases.append(
            {
                "config": config.to_json(),
                "tp": tp,
                "pp": pp,
                "global": dialect == "global",
                "load": str(written / ("iter_0000007" if dialect == "optimizer" else "release")),
                "optimizer": dialect == "optimizer",
                "legacy": str(legacy),
                "vocab_multiple": 128,
                "vocab_tp": tp,
                "logits": f"{family}.logits.{tp}" if pp == 1 and dialect != "optimizer" else "",
                "tokens": TOKENS,
                "save": str(save) if saved else "",
                "args": {name: value for name, value in args.items() if name != "params_dtype"},
            }
        )
    run_world(4, {"cases": cases}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dialect"), SAVES)
def test_what_megatron_core_saves_we_read(folder, family, dialect):
    """Loading strictly, into one rank and into TP2 x PP2, is asserted by the processes of the fixture."""
    source = torch_dist.open_source(str(folder / f"{family}.core.{dialect}"))
    assert source.details["homogeneous"] == (dialect == "homogeneous")
    assert source.config == CONFIGS[family]
    assert_equal(read_arrays(source), random_arrays(CONFIGS[family]))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_megatron_core_and_transformers_give_the_same_logits(folder, tmp_path, family, tp):
    from transformers import AutoModelForCausalLM

    config = CONFIGS[family]
    write_checkpoint(tmp_path, config, random_arrays(config), "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits
    found = torch.load(folder / f"{family}.logits.{tp}")[..., : config.vocab_size]
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1e-3
