"""The recipes of a growth's runs: its teacher, its control, its students, and models that are only scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.config.load import apply_override, build_config
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.engines.check import check_options
from megatron_inherit.inherit.grow import Rule
from megatron_inherit.train.preflight import RunPlan, engine_options, plan_run

TEACHER, CONTROL, START = "teacher", "control", "start"


@dataclass(frozen=True)
class GrowthPlan:
    """A growth before its first run.

    Attributes:
        config: The recipe.
        teacher: The teacher's run, resolved.
        rule: When it goes on and when it ends.
    """

    config: RunConfig
    teacher: RunPlan
    rule: Rule

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return Path(self.config.run.output)

    @property
    def model(self) -> ModelConfig:
        """The teacher's shape."""
        return self.teacher.model

    @property
    def takes_teacher(self) -> bool:
        """Tells whether the teacher is a checkpoint that is there, not one to be trained."""
        return self.config.model.init == "weights"

    @property
    def teacher_path(self) -> Path:
        """The teacher's weights, once it is trained."""
        return Path(str(self.config.model.path)) if self.takes_teacher else self.folder / TEACHER

    def teacher_recipe(self) -> RunConfig:
        """Trains the teacher, or scores the one that is taken."""
        if self.takes_teacher:
            return self.score_recipe(self.teacher_path, TEACHER)
        return self._recipe(TEACHER, {})

    def student_recipe(self, start: Path, name: str) -> RunConfig:
        """Trains a student."""
        changes = dict(self.config.grow.student)
        if any(_is_of(key, "distill") for key in changes):
            changes["distill.teacher"] = str(self.teacher_path)
        return self._recipe(name, changes, start)

    def control_recipe(self, start: Path) -> RunConfig:
        """Trains the random student, on the next token alone."""
        changes = {key: value for key, value in self.config.grow.student.items() if not _is_of(key, "distill")}
        return self._recipe(CONTROL, changes, start)

    def score_recipe(self, model: Path, name: str) -> RunConfig:
        """Scores a model on the evaluation windows and trains nothing."""
        changes: dict[str, Any] = {"train.steps": 0, "train.budget": None, "train.batch_ramp": None}
        changes |= {"distill": {}, "sharing": {}, "schedule": {"kind": "constant"}}
        return self._recipe(name, changes, model)

    def _recipe(self, name: str, changes: Mapping[str, Any], model: Path | None = None) -> RunConfig:
        values = self.config.model_dump(mode="json", exclude={"grow"})
        values["run"] |= {"name": f"{self.config.run.name}-{name}", "output": str(self.folder / name)}
        if model is not None:
            values["model"] = {"path": str(model), "init": "weights"}
        for key, value in changes.items():
            apply_override(values, f"{key}={json.dumps(value)}")
        return build_config(values, where=f"grow.student, for the run {name}" if changes else f"the run {name}")


def plan_growth(config: RunConfig, *, processes: int = 1) -> GrowthPlan:
    """Resolves a growth and refuses what cannot work, before anything runs.

    Args:
        config: The recipe.
        processes: Of each training.

    Raises:
        ConfigError: The recipe does not fit the teacher or a student, has no evaluation windows, or leaves nothing to
            grow.
        CheckpointError: The teacher is missing or damaged.
    """
    if config.eval.windows is None:
        raise ConfigError(
            "eval.windows: a growth compares losses on fixed windows.",
            fix="Make them with 'minherit data windows' and set eval.windows.",
        )
    if config.sharing.plan is not None or config.sharing.untie:
        raise ConfigError("sharing.plan: a growth changes the number of blocks, and stages would not cover them.")
    teacher = plan_run(config, world_size=processes)
    section, depth = config.grow, teacher.model.num_layers
    rule = Rule(
        depth=depth,
        start=section.start or max(1, depth // 2),
        increment=section.increment,
        tolerance=section.tolerance,
        margin=section.margin,
        through_vacuous=section.when_vacuous == "continue",
    )
    plan = GrowthPlan(config, teacher, rule)
    student = plan.student_recipe(plan.folder / START, "round")
    for num_layers in rule.depths:
        model = teacher.model.with_layers(num_layers)
        check_options(student.engine, engine_options(student), model, world_size=processes)
    return plan


def _is_of(key: str, section: str) -> bool:
    return key.partition(".")[0] == section
