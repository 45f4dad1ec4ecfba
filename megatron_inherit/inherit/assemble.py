"""Two checkpoints read as one model: blocks of a student among blocks of its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats.hf_config import student_config
from megatron_inherit.checkpoint.stream import Source, StoredTensor
from megatron_inherit.inherit.grow import Block
from megatron_inherit.inherit.inheritune import source_name


def assemble(student: Source, teacher: Source, blocks: Sequence[Block], *, stands_for: Sequence[int]) -> Source:
    """Gives the checkpoint that has the named blocks; nothing is read and nothing is written.

    What surrounds the blocks is the student's as long as one of its blocks is there.

    Args:
        student: The trained one; it stays open while the result is used.
        teacher: Of the same shape but for the depth.
        blocks: Whose block each one is.
        stands_for: The teacher's block for each block of the student.

    Raises:
        CheckpointError: The two differ in more than their depth.
    """
    config = student.config.with_layers(len(blocks))
    if teacher.config.with_layers(len(blocks)) != config:
        raise CheckpointError(
            f"{student.path} and {teacher.path} differ in more than their number of blocks.",
            fix="Give a student that was cut from this teacher.",
        )
    around = student if any(owner == "student" for owner, _ in blocks) else teacher
    sources = {"student": student, "teacher": teacher}
    tensors: dict[str, StoredTensor] = {}
    for spec in enumerate_tensors(config):
        if spec.layer is None:
            tensors[spec.name] = around.find(spec.name)
        else:
            owner, _ = blocks[spec.layer]
            tensors[spec.name] = sources[owner].find(source_name(spec, [block for _, block in blocks]))
    counterparts = [block if owner == "teacher" else stands_for[block] for owner, block in blocks]
    hf_config = teacher.hf_config and student_config(
        teacher.hf_config, config, counterparts, next(iter(around.tensors.values())).dtype
    )
    identity = {f"{name}: {file}": digest for name, one in sources.items() for file, digest in one.identity.items()}
    return dataclasses.replace(
        student, config=config, tensors=tensors, optimizer={}, own={}, hf_config=hf_config, identity=identity
    )
