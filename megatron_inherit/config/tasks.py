"""The section of a recipe about tasks that are scored while training goes on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from megatron_inherit.config.section import Positive, Section, Text, listed


class TasksSection(Section):
    """lm-eval tasks scored on the model in training; exactly one of names and suite.

    Attributes:
        names: Tasks, instead of ``suite``.
        suite: A suite, as of ``minherit evaluate``.
        data_dir: Folder of local task files; without it lm-eval's own data.
        every_steps: Steps between; the last step is always scored.
        limit: First items of each task only.
    """

    names: Annotated[tuple[Text, ...], BeforeValidator(listed)] = ()
    suite: Text | None = None
    data_dir: Text | None = None
    every_steps: Positive = 1000
    limit: Positive | None = None
