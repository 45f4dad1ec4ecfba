"""Runs a study: the teacher first, then the arms, one a device, each resumable by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_inherit.arch.families import ROLES
from megatron_inherit.base.atomic import write_text
from megatron_inherit.base.errors import ConfigError, DataError, DivergedError, UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.eval.runs import read_json
from megatron_inherit.inherit.select import parse_roles
from megatron_inherit.study.arms import POLL_SECONDS, Trainer, error_kind, is_finished, make_start, missing_inputs
from megatron_inherit.study.schema import TEACHER, Job, Study

logger = get_logger(__name__)

WAIT_SECONDS = 10.0
FAILED_SECONDS = 120.0
"""How long a teacher's failure stands before waiting tasks believe it: the first task may be about to try again."""


def run_study(study: Study, *, arms: Sequence[str] = (), processes: int = 1) -> None:
    """Runs what of a study is not finished.

    In a SLURM array each task takes its share of the arms, and the first one the teacher.

    Args:
        study: The study.
        arms: Names of the arms to run; default all. Arms that they come from run too.
        processes: Of each run.

    Raises:
        UsageError: There is no such arm.
        DataError: What an unfinished run reads is missing.
        MinheritError: What ended a run.
    """
    jobs = chosen_jobs(study, arms)
    mine, first = array_share(jobs, os.environ)
    require_inputs(study, jobs)
    study.folder.mkdir(parents=True, exist_ok=True)
    write_text(study.folder / f"{study.section.name}.yaml", study_yaml(study))
    with Trainer(processes=processes) as trainer:
        if study.teacher is not None:
            _teacher(study.teacher, trainer, train=first)
        _Queue(study, trainer, device_groups(processes), list(mine)).work()


def study_yaml(study: Study) -> str:
    """Writes a study; loading it gives the same one."""
    values = study.section.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def chosen_jobs(study: Study, arms: Sequence[str]) -> tuple[Job, ...]:
    """Gives the jobs of some arms and of those that they come from.

    Raises:
        UsageError: There is no such arm.
    """
    sections = {arm.name: arm for arm in study.section.arms}
    wanted: set[str] = set()
    for name in arms:
        if name not in sections:
            raise UsageError(f"--arm {name}: there is none.", expected=f"one of {', '.join(sections)}")
        while name != TEACHER:
            wanted.add(name)
            name = sections[name].origin  # noqa: PLW2901
    return tuple(job for job in study.jobs if not arms or (job.arm and job.arm.name in wanted))


def require_inputs(study: Study, jobs: Sequence[Job]) -> None:
    """Looks for what the unfinished runs read.

    Raises:
        DataError: Data, windows or a text is missing; names the command that makes it, where the study does.
    """
    for job in (*([study.teacher] if study.teacher else []), *jobs):
        if is_finished(job.config):
            continue
        missing = missing_inputs(job.config)
        text = job.arm.repair.text if job.arm and job.arm.repair else None
        missing += [f"repair.text {text}"] if text is not None and not Path(text).exists() else []
        if missing:
            made_by = study.section.made_by
            raise DataError(
                f"{study.section.name}: {job.name} reads what is not there: {', '.join(missing)}.",
                fix=f"Make it with '{made_by}', run in the project's source, or set these keys to data of yours."
                if made_by
                else "Make data with 'minherit data', and windows with 'minherit data windows'.",
            )


def array_share(jobs: Sequence[Job], environment: Mapping[str, str]) -> tuple[tuple[Job, ...], bool]:
    """Gives this SLURM array task's jobs and whether it is the first task; all jobs outside an array.

    An arm goes where the arm it comes from goes.

    Raises:
        UsageError: The array's indices have gaps, so that no task knows its place among them.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return tuple(jobs), True
    first, last = (int(environment.get(f"SLURM_ARRAY_TASK_{end}", "0")) for end in ("MIN", "MAX"))
    step = max(1, int(environment.get("SLURM_ARRAY_TASK_STEP", "1")))
    count = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1"))
    if "SLURM_ARRAY_TASK_MAX" in environment and (last - first) // step + 1 != count:
        raise UsageError(
            "The indices of this SLURM array have gaps, and some arms would run nowhere.",
            got=f"{count} tasks from {first} to {last}",
            fix="Submit it with --array=0-N; arms that have finished are only read.",
        )
    task = int(environment["SLURM_ARRAY_TASK_ID"]) - first
    shares: dict[tuple[str, int], int] = {}
    for job in jobs:
        name, origin = (job.arm.name, job.arm.origin) if job.arm else (TEACHER, TEACHER)
        of_origin = shares.get((origin, job.seed))
        shares[name, job.seed] = len(shares) % count if of_origin is None else of_origin
    mine = tuple(job for job in jobs if job.arm and shares[job.arm.name, job.seed] == task // step)
    return mine, task == 0


def device_groups(processes: int) -> list[tuple[int, ...] | None]:
    """Gives the GPUs of each run that goes on at a time; one run on all there is where they are too few."""
    import torch

    count = torch.cuda.device_count()
    if count < 2 * processes:
        return [None]
    return [tuple(range(first, first + processes)) for first in range(0, count - processes + 1, processes)]


def _teacher(job: Job, trainer: Trainer, *, train: bool) -> None:
    if is_finished(job.config):
        return
    if train:
        logger.info("%s: %d steps", job.name, job.config.train.steps or 0)
        trainer.train(job.config)
        return
    logger.info("Waiting for the first task of the array to train the teacher.")
    failed, since = None, 0.0
    while not is_finished(job.config):
        trainer.require_time(job.folder)
        status = read_json(job.folder / "exit_status.json")
        if status.get("exit_code", 0) in (0, 75):
            failed = None
        elif status != failed:
            failed, since = status, time.monotonic()
        elif time.monotonic() - since >= FAILED_SECONDS:
            kind = error_kind(status["exit_code"])
            raise kind(f"The teacher's run ended: {status.get('reason')}", fix=f"See {job.folder}.")
        time.sleep(WAIT_SECONDS)


@dataclass
class _Queue:
    """Jobs that wait and jobs that run, by their group of devices."""

    study: Study
    trainer: Trainer
    groups: list[tuple[int, ...] | None]
    waiting: list[Job]
    running: dict[int, Job] = field(default_factory=dict)

    def work(self) -> None:
        """Runs all jobs. An arm that diverges is told at the end; any other error ends the study, the others saved.

        Raises:
            MinheritError: What ended an arm.
        """
        diverged: list[DivergedError] = []
        while self.waiting or self.running:
            for group, job in tuple(self.running.items()):
                try:
                    if not self.trainer.is_over(job.config):
                        continue
                    _tell(job)
                except DivergedError as error:
                    logger.error("%s: %s", job.name, error)
                    diverged.append(error)
                    self._drop_what_comes_from(job)
                del self.running[group]
            for group in range(len(self.groups)):
                following = None if group in self.running else self._next()
                if following is not None:
                    self.waiting.remove(following)
                    self._begin(following, group)
            time.sleep(POLL_SECONDS if self.running else 0)
        if diverged:
            raise diverged[0]

    def _drop_what_comes_from(self, job: Job) -> None:
        for other in tuple(self.waiting):
            if (
                job.arm
                and other.arm
                and other in self.waiting
                and (other.arm.origin, other.seed) == (job.arm.name, job.seed)
            ):
                self.waiting.remove(other)
                self._drop_what_comes_from(other)

    def _next(self) -> Job | None:
        """Gives the first job whose origin is there."""
        busy = {(job.arm.name, job.seed) for job in (*self.running.values(), *self.waiting) if job.arm}
        return next((job for job in self.waiting if job.arm and (job.arm.origin, job.seed) not in busy), None)

    def _begin(self, job: Job, group: int) -> None:
        if is_finished(job.config):
            logger.info("%s: finished before", job.name)
            return
        start_of(self.study, job)
        logger.info("%s: begins", job.name)
        self.trainer.begin(job.config, devices=self.groups[group])
        self.running[group] = job


def start_of(study: Study, job: Job) -> Path | None:
    """Makes a job's start where it has one.

    Raises:
        ConfigError: Another start lies there.
    """
    arm = job.arm
    if arm is None or arm.layers is None:
        return None
    try:
        return make_start(
            study.origin_of(job),
            job.start,
            layers=arm.layers,
            reset=ROLES if arm.init == "random" else parse_roles(arm.reset),
            as_published=arm.init == "as-published",
            seed=job.seed,
            cut=arm.cut,
            repair=arm.repair,
        )
    except UsageError as error:
        raise ConfigError(f"arm {arm.name}: {error.what}", got=error.got, expected=error.expected) from error


def _tell(job: Job) -> None:
    from megatron_inherit.eval.runs import load_run

    final = load_run(job.folder).final or {}
    logger.info("%s: validation loss %.4f", job.name, final.get("loss", float("nan")))
