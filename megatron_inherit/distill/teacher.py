"""A frozen teacher on the ranks of its student, cut in the same way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.distill.cache import Method
from megatron_inherit.distill.targets import Targets, draw_targets, top_targets
from megatron_inherit.model.build import DecoderConfig, Parallel, build_chunks, build_single, decoder_config
from megatron_inherit.model.load import load_chunk, source_reader
from megatron_inherit.sharing.partition import Partition
from megatron_inherit.sharing.stage_plan import unshared

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.model.language_model import LanguageModel


def check_teacher(teacher: ModelConfig, student: ModelConfig, *, sequence_length: int, hidden: bool, tp: int) -> None:
    """Refuses a teacher that cannot read the student's samples or cannot be cut as its student is.

    Args:
        teacher: Its configuration.
        student: The student's.
        sequence_length: Tokens of a sample.
        hidden: Hidden states are compared, which takes equal widths.
        tp: Tensor parallel size of the ranks that it shares with its student.

    Raises:
        ConfigError: They do not fit.
    """
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            "distill.teacher: teacher and student have different vocabularies.",
            got=f"{teacher.vocab_size} and {student.vocab_size} tokens",
            fix="Distil between models of one tokenizer.",
        )
    if hidden and teacher.hidden_size != student.hidden_size:
        raise ConfigError(
            "distill.hidden_weight: hidden states are compared only between models of equal width.",
            got=f"{teacher.hidden_size} and {student.hidden_size}",
            fix="Set distill.hidden_weight to 0.",
        )
    if sequence_length > teacher.max_positions:
        raise ConfigError(
            "train.sequence_length: longer than the teacher's positions.",
            got=sequence_length,
            expected=f"at most {teacher.max_positions}",
        )
    if teacher.num_heads % tp or teacher.num_kv_heads % tp or teacher.ffn_size % tp:
        raise ConfigError(
            f"parallel.tp: {tp} does not divide the teacher's heads and MLP.",
            got=f"{teacher.num_heads} heads, {teacher.num_kv_heads} key/value groups, {teacher.ffn_size} MLP columns",
            fix="Set parallel.tp lower, or distil from cached targets (distill.cache).",
        )


def teacher_partition(num_layers: int, student: Partition) -> Partition:
    """Cuts a teacher at the same shares of its depth as its student, so that the ends of stages meet on one rank.

    Args:
        num_layers: Depth of the teacher.
        student: Layers of each of the student's pipeline chunks.

    Raises:
        ConfigError: A chunk would be empty.
    """
    depth = student.plan.num_layers
    bounds = tuple(round(num_layers * bound / depth) for bound in student.bounds)
    if any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ConfigError(
            "The teacher has too few layers for this pipeline.", got=f"{num_layers} over {len(bounds) - 1} chunks"
        )
    return Partition(unshared(num_layers), student.pipeline, student.chunks, bounds)


def build_teacher(
    source: Source,
    parallel: Parallel,
    groups: ProcessGroupCollection,
    device: torch.device,
    *,
    dtype: torch.dtype,
    partition: Partition | None = None,
    **fields: Any,
) -> list[LanguageModel]:
    """Builds this rank's part of a teacher and fills it: in evaluation mode, without gradients.

    Args:
        source: Its checkpoint.
        parallel: How its student is cut.
        groups: The student's process groups.
        device: Where it lives.
        dtype: Of its weights.
        partition: Its pipeline chunks, with a pipeline.
        fields: Further fields of the model's configuration.
    """
    layout = partition.layout() if partition is not None and parallel.pp > 1 else None
    even = Parallel(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, cp=parallel.cp, sequence_parallel=parallel.sequence_parallel
    )
    config: DecoderConfig = decoder_config(
        source.config, even, dtype=dtype, pipeline_model_parallel_layout=layout, **fields
    )
    chunks = list(build_chunks(source.config, config, groups, device))
    read = source_reader(source, source.config)
    for chunk in chunks:
        load_chunk(chunk, read)
        chunk.eval().requires_grad_(False)
    return chunks


def layers_at(chunks: Sequence[LanguageModel]) -> dict[int, torch.nn.Module]:
    """Gives this rank's layers by the number of layers passed at their end."""
    return {layer.layer_number: layer for chunk in chunks for layer in chunk.decoder.layers}


def target_predictor(
    source: Source, *, method: Method, entries: int, temperature: float, micro_batch: int, dtype: torch.dtype, seed: int
) -> Callable[[Batch], Targets]:
    """Builds a whole teacher in this process and gives what ``cache_writer.write_cache`` asks for.

    Args:
        source: The teacher.
        method: ``top`` or ``draw``.
        entries: Stored tokens for each token of a sample.
        temperature: Divides the logits.
        micro_batch: Sequences of one forward pass.
        dtype: Of the teacher.
        seed: Of the draws; a sample's draws depend on it and on the sample alone.
    """
    model = build_single(source.config, dtype=dtype)
    load_chunk(model, source_reader(source, source.config))
    model.eval()
    device = next(model.parameters()).device

    def chosen(logits: torch.Tensor, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        if method == "top":
            return top_targets(logits, entries, temperature=temperature)
        generator = torch.Generator(logits.device).manual_seed(seed * 1_000_003 + sample)
        return draw_targets(logits, entries, temperature=temperature, generator=generator)

    @torch.no_grad()
    def predict(batch: Batch) -> Targets:
        found = []
        for start in range(0, len(batch), micro_batch):
            piece = batch.select(start, start + micro_batch)
            arrays = (piece.tokens, piece.position_ids, piece.segment_ids)
            tokens, positions, segments = (
                None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays
            )
            logits = model(tokens, position_ids=positions, segment_ids=segments)
            rows = zip(logits, piece.sample_ids.tolist(), strict=True)
            found += [chosen(row[:, : source.config.vocab_size].float(), sample) for row, sample in rows]
        return tuple(torch.stack(part).cpu().numpy() for part in zip(*found, strict=True))  # type: ignore[return-value]

    return predict
