"""Grows a student until it matches its teacher, round by round, on a record that survives a kill at any instant.

The record is written after every run; what it holds is not done again. A run that was cut short goes on from its last
checkpoint, a start appears whole or not at all, so that the same recipe leads to the same decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_inherit.arch.families import ROLES
from megatron_inherit.base.atomic import write_json, write_text
from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import ConfigError, DataError
from megatron_inherit.base.faults import fault
from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.config.load import flatten, to_yaml
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.eval.growth_table import RECORD
from megatron_inherit.eval.runs import Run, read_json, with_defaults
from megatron_inherit.eval.val_loss import difference_stderr
from megatron_inherit.inherit.assemble import assemble
from megatron_inherit.inherit.grow import Block, Gap, Rule, continued, first_blocks, patched
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.execute import RECORD as INHERITED
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import describe_layers
from megatron_inherit.study.arms import make_start, missing_inputs
from megatron_inherit.study.growth_recipes import CONTROL, START, GrowthPlan
from megatron_inherit.train.run_folder import is_held, locked, make_writable

logger = get_logger(__name__)

STUDENT, RECIPE = "student", "grow.yaml"
VERSION = 1
Row = dict[str, Any]


class Runs(Protocol):
    """What runs recipes; ``study.arms.Trainer`` is one."""

    def train(self, config: RunConfig) -> Run:
        """Trains a recipe to its end, from where its folder stands."""
        ...


def grow(plan: GrowthPlan, runs: Runs) -> Row:
    """Carries a growth out, from where its folder stands.

    Args:
        plan: The resolved recipe.
        runs: Trains and scores its models.

    Returns:
        What grow.json holds: ``teacher``, ``control``, ``rounds`` and ``outcome``.

    Raises:
        DataError: The data or the windows are not there.
        MinheritError: What ended a run, or forbids one; a preempted growth goes on when it is run again.
    """
    over = read_json(plan.folder / RECORD).get("outcome") is not None
    if not over and (missing := missing_inputs(plan.config)):
        raise DataError(
            f"The growth reads what is not there: {', '.join(missing)}.",
            fix="The first lines of a recipe of the package name the script that makes it; else see 'minherit data'.",
        )
    make_writable(plan.folder)
    with locked(plan.folder):
        return Growth(plan, runs).run()


def gap_between(first: Run, second: Run) -> Gap:
    """Compares two finished runs, window by window: the first's loss less the second's.

    Raises:
        DataError: They were not scored on the same windows.
    """
    one, other = first.window_losses, second.window_losses
    if not one or not other or one["fingerprint"] != other["fingerprint"]:
        raise DataError(
            f"{first.path} and {second.path} were not scored on the same windows.",
            fix="Score both with the same eval.windows.",
        )
    mean, error = difference_stderr(one["losses"], other["losses"], one["counts"])
    return Gap(mean, None if math.isnan(error) else error)


@dataclass
class Growth:
    """The state machine; ``record`` is its state and grow.json its memory."""

    plan: GrowthPlan
    runs: Runs
    record: Row = field(default_factory=dict)
    done: dict[str, Run] = field(default_factory=dict)

    def run(self) -> Row:
        """Goes from the teacher to the outcome."""
        self._open()
        self._benchmark()
        advantage = self._control() if self.plan.config.grow.control else None
        while self.record["outcome"] is None:
            decision = self.plan.rule.next([_judged(row) for row in self.record["rounds"]], advantage)
            if isinstance(decision, int):
                self._round(len(self.record["rounds"]) + 1, decision)
            else:
                self._end(decision)
        return self.record

    def _open(self) -> None:
        folder, config = self.plan.folder, self.plan.config
        recipe = config.model_dump(mode="json")
        found = read_json(folder / RECORD)
        if found:
            _refuse_other(found["recipe"], recipe, folder)
        empty = {"version": VERSION, "recipe": recipe, "teacher": None, "control": None, "rounds": [], "outcome": None}
        self.record = found or empty
        write_text(folder / RECIPE, to_yaml(config))
        write_json(folder / "environment.json", collect_environment())

    def _save(self, step: int) -> None:
        fault("before_record", step)
        write_json(self.plan.folder / RECORD, self.record)
        fault("after_record", step)

    def _train(self, config: RunConfig) -> Run:
        """Runs a recipe once; waits for a run that an earlier, killed growth left behind and that is saving."""
        folder = Path(config.run.output)
        if folder.name not in self.done:
            _wait_until_free(folder)
            self.done[folder.name] = self.runs.train(config)
        return self.done[folder.name]

    def _teacher(self) -> Run:
        return self._train(self.plan.teacher_recipe())

    def _benchmark(self) -> None:
        if self.record["teacher"] is not None:
            return
        depth, taken = self.plan.rule.depth, self.plan.takes_teacher
        logger.info("Teacher of %d blocks: %s.", depth, f"{self.plan.teacher_path}, scored" if taken else "trained")
        figures = _figures(self._teacher())
        self.record["teacher"] = {"layers": depth, "path": str(self.plan.teacher_path), **figures}
        self._save(-1)
        logger.info("Benchmark: validation loss %s.", _pair(figures["loss"], figures["stderr"]))

    def _control(self) -> Gap:
        row = self.record["control"]
        if row is None:
            rule = self.plan.rule
            logger.info("Control: a random student of %d blocks.", rule.start)
            folder = self.plan.folder / CONTROL
            seed = self.plan.config.run.seed
            start = make_start(self.plan.teacher_path, folder / START, layers=range(rule.start), reset=ROLES, seed=seed)
            run = self._train(self.plan.control_recipe(start))
            gap = gap_between(run, self._teacher())
            row = {"layers": rule.start, "path": CONTROL, **_figures(run), **_gap_row(gap, rule.margin)}
            row["vacuous"] = rule.is_vacuous(gap)
            self.record["control"] = row
            self._save(0)
            self._tell_control(row)
        return Gap(row["gap"], row["gap_stderr"])

    def _tell_control(self, row: Row) -> None:
        margin, gap = self.plan.rule.margin, _pair(row["gap"], row["gap_stderr"])
        if row["vacuous"]:
            logger.warning(
                "The question is vacuous: the teacher beats a random student of %d blocks by %s nats only, less than "
                "%g. A student that matches it shows nothing; train longer, on more data, or a larger teacher.",
                row["layers"],
                gap,
                margin,
            )
        else:
            weak = "" if row["clear"] else f", within two standard errors of the margin of {margin:g}"
            logger.info(
                "Not vacuous: the teacher beats a random student of %d blocks by %s nats%s.", row["layers"], gap, weak
            )

    def _round(self, number: int, num_layers: int) -> None:
        rule, mode = self.plan.rule, self.plan.config.grow.mode
        blocks = self._blocks(number, num_layers)
        name = f"round-{number:02d}-n{len(blocks):02d}"
        logger.info("Round %d: %d of %d blocks (%s).", number, len(blocks), rule.depth, _describe(blocks))
        folder = self.plan.folder / name
        start = self._start(number, folder / START, blocks)
        fault("round_started", number)
        trained = mode != "patch" or number == 1
        recipe = self.plan.student_recipe(start, name) if trained else self.plan.score_recipe(start, name)
        run = self._train(recipe)
        gap = gap_between(run, self._teacher())
        row: Row = {
            "round": number,
            "layers": len(blocks),
            "blocks": _describe(blocks),
            "trained": trained,
            "path": name if trained else f"{name}/{START}",
            **_figures(run),
            **_gap_row(gap, rule.tolerance),
            "parity": rule.is_parity(gap),
        }
        self.record["rounds"].append(row)
        self._save(number)
        verdict = "matches the teacher" if row["parity"] else "does not match the teacher"
        logger.info(
            "Round %d: loss %s, %s above the teacher's: %s (tolerance %g%s).",
            number,
            _pair(row["loss"], row["stderr"]),
            _pair(gap.nats, gap.stderr),
            verdict,
            rule.tolerance,
            "" if row["clear"] else ", within two standard errors of it",
        )

    def _blocks(self, number: int, num_layers: int) -> tuple[Block, ...]:
        """Says whose blocks the round's student has; those of the student are of the round it grows from."""
        mode, rule = self.plan.config.grow.mode, self.plan.rule
        if number == 1 or mode == "restart":
            return tuple(("teacher", block) for block in first_blocks(mode, rule.depth, num_layers))
        if mode == "continue":
            return continued(self.record["rounds"][-1]["layers"], num_layers)
        return patched(rule.depth, rule.start, num_layers)

    def _start(self, number: int, folder: Path, blocks: Sequence[Block]) -> Path:
        mode, rule = self.plan.config.grow.mode, self.plan.rule
        if number == 1 or mode == "restart":
            return make_start(self.plan.teacher_path, folder, layers=[block for _, block in blocks])
        before = self.record["rounds"][0 if mode == "patch" else -1]
        return make_grown(
            self.plan.folder / before["path"],
            self.plan.teacher_path,
            folder,
            blocks=blocks,
            stands_for=first_blocks(mode, rule.depth, before["layers"]),
        )

    def _end(self, reason: str) -> None:
        rounds, vacuous = self.record["rounds"], reason == "vacuous"
        last = None if vacuous else rounds[-1]
        self.record["outcome"] = {
            "reason": reason,
            "layers": last and last["layers"],
            "student": last and last["path"],
        }
        if last is not None:
            _point(self.plan.folder / STUDENT, last["path"])
        self._save(len(rounds) + 1)


def make_grown(
    student: Path, teacher: Path, folder: Path, *, blocks: Sequence[Block], stands_for: Sequence[int]
) -> Path:
    """Writes a model of a student's blocks and its teacher's; a folder that is there already is left as it is.

    Args:
        student: The trained student.
        teacher: Its teacher.
        folder: A Hugging Face folder with ``inherit.json``.
        blocks: Whose block each one is.
        stands_for: The teacher's block for each block of the student.
    """
    if (folder / INHERITED).is_file():
        return folder
    with open_source(student) as own, open_source(teacher) as other:
        source = assemble(own, other, blocks, stands_for=stands_for)
        plan = plan_inheritance(source, layers=range(len(blocks)))
        folder.parent.mkdir(parents=True, exist_ok=True)
        made_of = {"student": own.path, "teacher": other.path, "blocks": _describe(blocks)}
        execute(plan, folder, source=source, record={"grown": made_of})
    return folder


def describe_rule(rule: Rule) -> str:
    """Writes the depths that a growth may come to."""
    return ", ".join(map(str, rule.depths))


def _judged(row: Row) -> tuple[int, Gap]:
    return row["layers"], Gap(row["gap"], row["gap_stderr"])


def _figures(run: Run) -> Row:
    final = run.final
    if final is None:
        raise DataError(f"{run.path} was never evaluated.", fix="Set eval.windows.")
    return {
        "loss": final["loss"],
        "stderr": final["stderr"],
        "steps": final["step"],
        "tokens": final["tokens"],
        "seconds": run.seconds,
        "parameters": run.environment.get("parameters"),
    }


def _gap_row(gap: Gap, bar: float) -> Row:
    return {"gap": gap.nats, "gap_stderr": gap.stderr, "clear": gap.is_clear(bar)}


def _describe(blocks: Sequence[Block]) -> str:
    """Writes whose blocks they are: ``0-3``, or ``0-3 of the student, 4-5``."""
    own = [block for owner, block in blocks if owner == "student"]
    rest = [block for owner, block in blocks if owner == "teacher"]
    parts = [f"{describe_layers(own)} of the student"] if own else []
    return ", ".join([*parts, describe_layers(rest)] if rest else parts)


def _pair(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _point(link: Path, target: str) -> None:
    """Lets a name in the folder lead to the grown student."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _wait_until_free(folder: Path) -> None:
    told = False
    while is_held(folder):
        if not told:
            logger.info("Waiting for the job that still writes into %s.", folder)
            told = True
        time.sleep(0.2)


def _refuse_other(before: Row, now: Row, folder: Path) -> None:
    old, new = flatten(with_defaults(before)), flatten(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(_FREE):
            raise ConfigError(
                f"{folder} holds a growth of another recipe: {key} differs.",
                got=old.get(key),
                expected=new.get(key),
                fix="Choose another run.output, or delete that folder.",
            )


_FREE = ("logging", "guard", "checkpoint", "data.verify", "eval.micro_batch")
