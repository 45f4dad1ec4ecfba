"""Processes in which Megatron-Core itself loads what we wrote and writes what we shall read."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

from megatron_inherit.arch.model_config import ModelConfig


def run_world(world: int, job: dict, folder: Path, *, timeout: float = 900) -> None:
    """Runs ``job`` in ``world`` processes over gloo; raises with the first process's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enter, args=(rank, world, port, job, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    failures = sorted(folder.glob("failure.*"))
    for process in processes:
        if process.is_alive():
            process.kill()
    assert not failures, failures[0].read_text()
    assert all(process.exitcode == 0 for process in processes)


def _enter(rank: int, world: int, port: int, job: dict, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        import torch

        torch.set_num_threads(1)
        from megatron_inherit.model.cpu import cuda_means_cpu
        from megatron_inherit.model.groups import leave_processes, start_processes

        start_processes()
        with cuda_means_cpu():
            for case in job["cases"]:
                _run(case, Path(folder))
        leave_processes()
    except BaseException:
        (Path(folder) / f"failure.{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _run(case: dict, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_inherit.model.groups import make_groups

    make_groups(tp=case["tp"], pp=case["pp"])
    config = ModelConfig.from_json(case["config"])
    model = build(config, case)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "non_homogeneous_layers": case["global"]}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    strict = StrictHandling.RAISE_UNEXPECTED if case.get("optimizer") else StrictHandling.RAISE_ALL
    loaded = dist_checkpointing.load(state["model"], case["load"], strict=strict)
    model.load_state_dict({name: loaded[name] for name in state["model"]}, strict=True)
    rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if case["pp"] > 1 else "")
    legacy = torch.load(Path(case["legacy"]) / "release" / name / "model_optim_rng.pt", weights_only=False)["model"]
    own = {key: value for key, value in model.state_dict().items() if value is not None and "_extra" not in key}
    assert own.keys() == legacy.keys(), own.keys() ^ legacy.keys()
    for key, value in own.items():
        assert torch.equal(value, legacy[key]), key
    if case.get("logits"):
        tokens = torch.tensor(case["tokens"])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model.eval()(tokens, positions, None)
        if dist.get_rank() == 0:
            torch.save(logits, folder / case["logits"])
    if case.get("optimizer"):
        _take_up(model, case, metadata)
    dist.barrier()
    if case.get("save"):
        common = {"args": argparse.Namespace(**case["args"]), "iteration": 5}
        dist_checkpointing.save({**model.sharded_state_dict(metadata=metadata), **common}, case["save"])
        dist.barrier()


def _take_up(model, case: dict, metadata: dict) -> None:
    """Megatron-Core's distributed optimizer resumes from what we wrote: moments 1 and 2 above the weights."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, buffers, model)
    options = OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.1, use_distributed_optimizer=True)
    overrides = get_standard_config_overrides(options)
    chained = get_megatron_optimizer(options, [wrapped], overrides, use_gloo_process_groups=False)
    (inner,) = chained.chained_optimizers
    inner._init_optimizer_states_with_dummy_values()
    sharding = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = chained.sharded_state_dict(state["model"], is_loading=True, metadata=metadata | sharding)
    loaded = dist_checkpointing.load(state, case["load"], strict=StrictHandling.RAISE_ALL)
    moments = loaded["optimizer"].pop("param_state")
    chained.load_state_dict(loaded["optimizer"])
    assert {float(state["step"]) for state in inner.optimizer.state.values()} == {7.0}
    for kept in inner.optimizer.state.values():
        kept.pop("step")  # torch's Adam has one beside the moments; the loader is made for Adams that have none
    inner.load_parameter_state_from_fully_reshardable(moments)
    shards = [entry["param_map"] for maps in inner.gbuf_ranges for kind in maps.values() for entry in kind]
    seen = 0
    for parameter, ranges in (pair for shard in shards for pair in shard.items()):
        found = inner._get_main_param_and_optimizer_states(parameter)
        weights = found["param"].detach()
        assert torch.equal(weights, parameter.detach().flatten()[ranges["param"].start : ranges["param"].end])
        assert torch.equal(found["exp_avg"], weights + 1)
        assert torch.equal(found["exp_avg_sq"], weights + 2)
        seen += weights.numel()
    assert seen > 0
    assert {group["betas"] for group in inner.optimizer.param_groups} == {(0.8, 0.9)}
    assert len(inner.optimizer.param_groups) == 2


def build(config: ModelConfig, case: dict):
    """Makes Megatron-Core's own GPTModel with its local layer spec."""
    from functools import partial

    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    rms = config.rope is not None
    silu, gelu = torch.nn.functional.silu, partial(torch.nn.functional.gelu, approximate="tanh")
    transformer = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_size,
        normalization="RMSNorm" if rms else "LayerNorm",
        gated_linear_unit=rms,
        activation_func=silu if rms else gelu,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        layernorm_epsilon=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    unit = case["vocab_multiple"] * case["vocab_tp"]
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm" if rms else None),
        vocab_size=-(-config.vocab_size // unit) * unit,
        max_sequence_length=config.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope" if rms else "learned_absolute",
        share_embeddings_and_output_weights=config.tied,
        parallel_output=False,
    )


if __name__ == "__main__":
    run_world(int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
