"""What a study may say: its arms, what they share, and what is claimed of them; needs no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.config.load import apply_override, build_config, find_recipe, flatten, read_yaml, validate
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.config.section import Count, Part, Positive, Real, Section, Text, listed
from megatron_inherit.eval.repair import parse_repair
from megatron_inherit.study.layers import require_words


def _several(value: Any) -> Any:
    """Takes one number for a list of one."""
    return [value] if isinstance(value, int | float) else value


SHIPPED = "megatron_inherit.study.shipped"
TEACHER = "teacher"
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.+-]{0,63}$")]
Shares = Annotated[tuple[Part, ...], BeforeValidator(_several)]
Gains = Annotated[tuple[float, ...], BeforeValidator(_several)]
RoleName = Literal["all", "embed", "pos_embed", "attn", "mlp", "norm", "final_norm", "head"]
_SAME_DATA = ("data", "train.sequence_length", "train.global_batch", "train.batch_ramp")
_SAME_EVAL = ("eval.windows", "eval.every_steps")


class TeacherSection(Section):
    """Where the arms come from: a checkpoint, or a run of the study.

    Attributes:
        path: Checkpoint of any format; without it the study's recipe, as it stands, is run to make the teacher.
        set: What that run changes in the recipe, by dotted key.
        seed: Of that run.
    """

    path: Text | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    seed: Count = 0

    @model_validator(mode="after")
    def _given_or_made(self) -> TeacherSection:
        if self.path is not None and self.set:
            raise ConfigError(
                "teacher.set: a given checkpoint is not trained.", fix="Remove teacher.path or teacher.set."
            )
        return self


class CutSection(Section):
    """How wide a cut student is; shares of the teacher's sizes.

    Attributes:
        hidden, heads, ffn: Channels of the residual stream, heads (query and key/value alike), channels of the MLPs.
        by: ``activation`` keeps the channels with the largest mean activations, ``first`` the first ones.
    """

    hidden: Part = 1.0
    heads: Part = 1.0
    ffn: Part = 1.0
    by: Literal["activation", "first"] = "activation"


class RepairSection(Section):
    """What is refitted in a cut before it is trained, in closed form.

    Attributes:
        methods: Words of ``minherit inherit --repair``.
        text: File or folder of text to fit on; default Python's language reference.
    """

    methods: Text
    text: Text | None = None


class ArmSection(Section):
    """One line of a study.

    Attributes:
        name: What tables call it.
        init: ``inherit`` copies blocks, ``as-published`` what the released scripts copy, ``random`` nothing.
        layers: Words of ``minherit inherit --layers``; also ``middle:N``, ``spaced:N`` and, in the place of N, ``a/b``
            for that share of the origin's depth.
        origin: An earlier arm whose result is taken instead of the teacher.
        reset: Roles drawn anew.
        cut: A narrower student.
        repair: Refits what follows the cut.
        model: ``model`` section of a random model that is no part of the teacher.
        residual: False trains without residual connections.
        steps: Optimizer steps; default the recipe's.
        set: What the arm changes in the study's recipe, by dotted key; ``{teacher}`` stands for the teacher's path.
    """

    name: Name
    init: Literal["inherit", "as-published", "random"] = "inherit"
    layers: Text | None = None
    origin: Name = TEACHER
    reset: Annotated[tuple[RoleName, ...], BeforeValidator(listed)] = ()
    cut: CutSection | None = None
    repair: RepairSection | None = None
    model: dict[str, Any] | None = None
    residual: bool = True
    steps: Positive | None = None
    set: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_start(self) -> ArmSection:
        if (self.layers is None) == (self.model is None):
            raise ConfigError(f"arm {self.name}: exactly one of layers and model must be given.")
        if self.model is not None and (self.init != "random" or self.reset or self.cut):
            raise ConfigError(f"arm {self.name}: a model section is drawn at random.", fix="Set init: random.")
        if self.init == "random" and (self.reset or self.cut):
            raise ConfigError(f"arm {self.name}: nothing of a random model is reset or cut.")
        if self.repair is not None and (self.init != "inherit" or self.reset or self.cut):
            raise ConfigError(
                f"arm {self.name}: a repair is fitted to whole, inherited blocks.",
                fix="Leave out reset, cut and init, or repair.",
            )
        return self


class ClaimSection(Section):
    """What is claimed of two arms' losses, to be held or not by the figures.

    Attributes:
        id: What tables call it.
        says: In words.
        lower, higher: Arms; the claim is about ``loss(higher) - loss(lower)``, the gain.
        at: Shares of the arms' own steps at which it is claimed.
        higher_at: Share for the higher arm, where it is another one.
        by: Least gain, in nats, at each of ``at``.
        within: Largest difference either way.
        shrinks: The gain falls from each of ``at`` to the next.
        share, of: The gain is at most this share of that of arm ``of``.
    """

    id: Text
    says: Text
    lower: Name
    higher: Name
    at: Shares = (1.0,)
    higher_at: Part | None = None
    by: Gains | None = None
    within: Real | None = None
    shrinks: bool = False
    share: Real | None = None
    of: Name | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ClaimSection:
        forms = [self.by is not None, self.within is not None, self.shrinks, self.share is not None]
        if sum(forms) != 1 or (self.share is None) != (self.of is None):
            raise ConfigError(f"claim {self.id}: exactly one of by, within, shrinks, and share with of must be given.")
        if self.by is not None and len(self.by) != len(self.at):
            raise ConfigError(
                f"claim {self.id}: as many values in by as in at.", got=len(self.by), expected=len(self.at)
            )
        return self


class StudySection(Section):
    """A study.

    Attributes:
        name: What pages call it.
        question: What it answers.
        made_by: Command that makes what the study reads, for whoever has not got it.
        output: Folder; studies of one folder share its teacher and those arms that they have in common.
        recipe: Name or path of a recipe, or its sections; its ``run`` section does not count, and its ``model`` section
            is the teacher's.
        set: What all arms change in it, by dotted key.
        seeds: Every arm runs once with each.
        varies: ``data`` where the arms are to differ in it.
        teacher: Where they come from.
        control: Arm to which gaps are taken.
        arms: In the order of tables; an arm can come from an earlier one.
        claims: To be judged by the figures.
    """

    name: Name
    question: Text
    made_by: Text | None = None
    output: Text
    recipe: dict[str, Any]
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2)
    varies: Literal["data"] | None = None
    teacher: TeacherSection = TeacherSection()
    control: Name
    arms: Annotated[tuple[ArmSection, ...], Field(min_length=1)]
    claims: tuple[ClaimSection, ...] = ()

    @model_validator(mode="after")
    def _names_known(self) -> StudySection:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds: one stands twice, and a run would count twice.", got=list(self.seeds))
        names: list[str] = []
        for arm in self.arms:
            if arm.name in (*names, TEACHER):
                raise ConfigError(f"arms: the name {arm.name!r} stands twice.")
            if arm.origin not in (*names, TEACHER):
                raise ConfigError(f"arm {arm.name}: origin {arm.origin!r} is no earlier arm.")
            names.append(arm.name)
        wanted = {"control": self.control} | {
            f"claim {claim.id}": word
            for claim in self.claims
            for word in (claim.lower, claim.higher, claim.of)
            if word is not None and word not in names
        }
        for key, word in wanted.items():
            if word not in names:
                raise ConfigError(f"{key}: there is no arm {word!r}.", expected=f"one of {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        arm: Its section; None for the teacher.
        seed: Of the run.
        folder: The run's folder.
        config: The recipe; ``model.path`` is where its start will be.
    """

    arm: ArmSection | None
    seed: int
    folder: Path
    config: RunConfig

    @property
    def name(self) -> str:
        """What lines and errors call it."""
        return TEACHER if self.arm is None else f"{self.arm.name}, seed {self.seed}"

    @property
    def start(self) -> Path:
        """Folder of the student before training."""
        return self.folder / "start"


@dataclass(frozen=True)
class Study:
    """A study with its folder and its runs.

    Attributes:
        section: What was asked.
        folder: Where everything lies.
        teacher: The teacher's run, or None where it is a given checkpoint.
        jobs: The arms' runs, arm by arm.
    """

    section: StudySection
    folder: Path
    teacher: Job | None
    jobs: tuple[Job, ...]

    @property
    def teacher_path(self) -> str:
        """Where the teacher's weights are."""
        return str(self.teacher.folder) if self.teacher else str(self.section.teacher.path)

    def origin_of(self, job: Job) -> str:
        """Gives the path of what an arm's start is taken from."""
        if job.arm is None or job.arm.origin == TEACHER:
            return self.teacher_path
        return str(run_folder(self.folder, job.arm.origin, job.seed))


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Names the folder of an arm's run."""
    return folder / "arms" / arm / f"seed{seed}"


def load_study(study: str | Path, overrides: Sequence[str] = (), *, folder: Path | None = None) -> Study:
    """Reads a study by name or path and settles every run of it.

    Args:
        study: Name of a shipped study, or path of a YAML file.
        overrides: ``key.path=value`` words; keys of the study, or of its recipe.
        folder: Instead of its ``output``.

    Raises:
        ConfigError: Whatever is wrong, with the key's path; arms that differ in data or evaluation.
    """
    values = read_yaml(find_recipe(study, package=SHIPPED, kind="study"))
    if isinstance(values.get("recipe"), str):
        values["recipe"] = read_yaml(find_recipe(values["recipe"]))
    for override in overrides:
        key = override.partition("=")[0].strip().partition(".")[0]
        apply_override(values["recipe"] if key in RunConfig.model_fields else values, override)
    if folder is not None:
        values["output"] = str(folder)
    section = validate(StudySection, values, where=str(study))
    return _settle(section, Path(section.output))


def _settle(section: StudySection, folder: Path) -> Study:
    base = section.recipe
    teacher = None
    if section.teacher.path is None:
        path = folder / TEACHER
        run = {"name": TEACHER, "output": str(path), "seed": section.teacher.seed}
        if "model" not in base:
            raise ConfigError(
                f"{section.name}: no teacher.", fix="Give the recipe a model section, or set teacher.path."
            )
        config = _config(base, run, base["model"], section.teacher.set, where=f"{section.name}: teacher")
        teacher = Job(None, section.teacher.seed, path, config)
    teacher_path = str(teacher.folder) if teacher else str(section.teacher.path)
    jobs = tuple(_jobs(section, folder, base, teacher_path))
    _require_comparable(section, teacher, jobs)
    return Study(section, folder, teacher, jobs)


def _jobs(section: StudySection, folder: Path, base: dict[str, Any], teacher: str) -> Iterator[Job]:
    for arm in section.arms:
        _require_understood(section.name, arm)
        changes = {key: value.replace("{teacher}", teacher) if isinstance(value, str) else value
                   for key, value in (section.set | arm.set).items()}  # fmt: skip
        if arm.steps is not None:
            changes |= {"train.steps": arm.steps, "train.budget": None}
        for seed in section.seeds:
            path = run_folder(folder, arm.name, seed)
            model = arm.model or {"path": str(path / "start"), "init": "weights", "residual": arm.residual}
            run = {"name": arm.name, "output": str(path), "seed": seed}
            yield Job(arm, seed, path, _config(base, run, model, changes, where=f"{section.name}: arm {arm.name}"))


def _require_understood(study: str, arm: ArmSection) -> None:
    try:
        if arm.layers is not None:
            require_words(arm.layers)
        if arm.repair is not None:
            parse_repair(arm.repair.methods)
    except UsageError as error:
        raise ConfigError(f"{study}: arm {arm.name}: {error.what}", got=error.got, expected=error.expected) from error


def _config(
    base: dict[str, Any], run: dict[str, Any], model: dict[str, Any], changes: dict[str, Any], *, where: str
) -> RunConfig:
    values = copy.deepcopy(base) | {"run": run, "model": model}
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{where}: set.{key}: {name} has no keys below it.")
        section[last] = value
    return build_config(values, where=where)


def _require_comparable(section: StudySection, teacher: Job | None, jobs: Sequence[Job]) -> None:
    """Refuses arms that are trained on, or scored by, something else than the first one."""
    first = _compared(jobs[0].config)
    if first["eval.windows"] is None:
        raise ConfigError(
            f"{section.name}: a study needs eval.windows.", fix="Make a file with 'minherit data windows'."
        )
    for job in jobs[1:]:
        for key, value in _compared(job.config).items():
            of_data = key.startswith(_SAME_DATA)
            if value == first[key] or (of_data and section.varies == "data"):
                continue
            raise ConfigError(
                f"{section.name}: arm {job.config.run.name} differs in {key}, so that its loss cannot be compared.",
                got=value,
                expected=first[key],
                fix="Set varies: data if that is the question." if of_data else "All arms are scored alike.",
            )
    if teacher is not None and _compared(teacher.config)["eval.windows"] != first["eval.windows"]:
        raise ConfigError(f"{section.name}: the teacher is scored by other windows.", fix="Leave eval.windows alone.")


def _compared(config: RunConfig) -> dict[str, Any]:
    keys = (*_SAME_DATA, *_SAME_EVAL)
    return {key: value for key, value in flatten(config.model_dump(mode="json")).items() if key.startswith(keys)}
