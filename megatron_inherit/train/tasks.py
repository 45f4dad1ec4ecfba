"""Scores lm-eval tasks on the model in training, every so many steps: on the engine itself, nothing is exported."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.stream import SideFile
from megatron_inherit.config.tasks import TasksSection
from megatron_inherit.train.preflight import RunPlan
from megatron_inherit.train.state import RunState

if TYPE_CHECKING:
    from megatron_inherit.eval.harness.tasks import Suite
    from megatron_inherit.train.session import Session

logger = get_logger(__name__)


@dataclass(frozen=True)
class TaskScorer:
    """What is scored, and with which tokenizer.

    Attributes:
        section: Of the recipe.
        names: The tasks.
        suite: That they are of, if they are of one.
        tokenizer: Of transformers.
    """

    section: TasksSection
    names: Sequence[str]
    suite: Suite | None
    tokenizer: Any

    def score(self, run: Session, step: int) -> dict[str, float]:
        """Runs the tasks; all ranks call this together, and each replica takes its share of the requests.

        Returns:
            ``TASK/METRIC`` and, where there is one, ``TASK/METRIC_stderr``; on rank 0 at least.
        """
        import torch

        from megatron_inherit.eval.harness.lm import LogitsModel, Share, batch_tokens_of, engine_logits, window_of
        from megatron_inherit.eval.harness.run import evaluate

        options, engine, model = run.plan.options, run.engine, run.plan.model
        multiple = math.lcm(options.tp if options.sequence_parallel else 1, 2 * options.cp if options.cp > 1 else 1)
        logits = engine_logits(engine, multiple=multiple, pipeline_size=options.pp)

        def beating(tokens: torch.Tensor) -> torch.Tensor:
            run.watchdog.progress(step, "tasks")
            return logits(tokens)

        place = engine.topology
        adapter = LogitsModel(
            beating,
            self.tokenizer,
            max_length=window_of(model.max_positions) // multiple * multiple,
            batch_tokens=batch_tokens_of(model.vocab_size),
            share=Share(place.data_rank, place.data_size, engine.reduce_sum),
        )
        data_dir = None if self.section.data_dir is None else Path(self.section.data_dir)
        with torch.random.fork_rng():  # lm-eval seeds the generators that training goes on with
            rows = evaluate(adapter, self.names, chosen=self.suite, data_dir=data_dir, limit=self.section.limit)
        values = {f"{row.task}/{row.metric}": row.value for row in rows}
        errors = {f"{row.task}/{row.metric}_stderr": row.stderr for row in rows if row.stderr is not None}
        return values | errors


def open_tasks(plan: RunPlan, side_files: Sequence[SideFile]) -> TaskScorer | None:
    """Finds the tasks of a recipe and the tokenizer that travels with its checkpoints, before the model is built.

    Raises:
        UsageError: A task or suite is unknown.
        DataError: A task's file or data, or the tokenizer, is missing.
    """
    section = plan.config.eval.tasks
    if section is None:
        return None
    from megatron_inherit.base.optional import require
    from megatron_inherit.checkpoint.files import file_pool
    from megatron_inherit.eval.harness.run import plan_tasks, quiet, require_data
    from megatron_inherit.eval.hf_folder import load_tokenizer

    quiet()
    require("lm_eval", "eval.tasks")
    data_dir = None if section.data_dir is None else Path(section.data_dir)
    names, suite = plan_tasks(section.names, section.suite, data_dir)
    if data_dir is None:
        require_data(names)
    with tempfile.TemporaryDirectory(prefix="minherit-") as folder, file_pool() as pool:
        for file in side_files:
            Path(folder, file.name).write_bytes(file.read(pool))
        return TaskScorer(section, names, suite, load_tokenizer(Path(folder)))


def are_tasks_due(run: Session, state: RunState) -> bool:
    """Tells whether a step is one after which the tasks are scored: the last one is, the start is not."""
    if run.tasks is None or not state.step:
        return False
    return state.step % run.tasks.section.every_steps == 0 or state.step == run.plan.total_steps


def score_tasks(run: Session, state: RunState) -> None:
    """Scores the tasks of the recipe, and writes the row."""
    scorer = run.tasks
    if scorer is None:
        return
    values = scorer.score(run, state.step)
    row: dict[str, Any] = {"kind": "tasks", "step": state.step, "tokens": state.tokens, **values}
    run.metrics.write(row)
    run.metrics.send(row)
    if run.is_first:
        shown = [f"{name} {value:.4f}" for name, value in values.items() if not name.endswith("_stderr")]
        logger.info("step %d: %s", state.step, ", ".join(shown))
