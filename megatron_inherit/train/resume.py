"""Finds the newest checkpoint that is whole, refuses one of another run, and sets engine and run to where it stood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.sharing.stage_plan import StagePlan
from megatron_inherit.train.checkpointing import LATEST, list_steps, step_folder, within_bad_steps
from megatron_inherit.train.snapshot import restore_random_state
from megatron_inherit.train.state import RunState

if TYPE_CHECKING:
    import torch

    from megatron_inherit.engines.base import Engine

logger = get_logger(__name__)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must share with the run that continues it.

    Attributes:
        model: ModelConfig as JSON.
        tokenizer: Hash of the tokenizer that made the token ids, or empty.
        data: Hash of the token files.
        order: Hash of everything that maps a sample's index to its tokens.
        stages: Stage plan as JSON, or None where nothing is shared.
    """

    model: Mapping[str, Any]
    tokenizer: str
    data: str
    order: str
    stages: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Gives plain values."""
        return asdict(self)

    def refuse_other(self, stored: Mapping[str, Any], where: Path) -> None:
        """Raises CheckpointError, saying what differs and what to change, for a checkpoint of another run."""
        model = json.loads(json.dumps(dict(self.model)))
        changed = [key for key in model if stored["model"].get(key) != model[key]]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{where} holds another model: {', '.join(changed)} differ.",
                got=f"{key} = {stored['model'].get(key)}",
                expected=f"{key} = {model[key]}",
                fix="Set run.output to another folder, or model.path to the model of that run.",
            )
        if not _continues(self.stages, stored.get("stages")):
            raise CheckpointError(
                f"{where} was trained with another stage plan.",
                got=stored.get("stages") and str(StagePlan.from_json(stored["stages"])),
                expected=self.stages and str(StagePlan.from_json(self.stages)),
                fix="Set sharing.plan back, or to a finer split of that plan, or run.output to another folder.",
            )
        for name, key in (("tokenizer", "data.path"), ("data", "data.path"), ("order", "data.*, run.seed")):
            if stored[name] != getattr(self, name):
                what = {"tokenizer": "another tokenizer", "data": "other data", "order": "another sample order"}[name]
                raise CheckpointError(
                    f"{where} was trained with {what}.",
                    got=stored[name] or "none",
                    expected=getattr(self, name) or "none",
                    fix=f"Set run.output to another folder, or {key} (and sequence_length) back.",
                )


def _continues(stages: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> bool:
    """Tells whether a model can go on from another: with the same stages, or a split of them, down to none shared."""
    if stages == stored or stored is None:
        return stages == stored
    return stages is None or StagePlan.from_json(stages).refines(StagePlan.from_json(stored))


def refuse_checkpoints(folder: Path) -> None:
    """Raises UsageError if checkpoints are there that a new start would mix with its own."""
    steps = list_steps(folder)
    if steps:
        raise UsageError(
            f"{folder} holds checkpoints, the newest of step {steps[-1]}.",
            fix="Set run.output to another folder, or resume with --resume auto.",
        )


def find_checkpoint(folder: Path, engine: Engine, *, sound: bool = False) -> Path | None:
    """Finds the newest checkpoint whose every file is what its manifest says; all ranks call this together.

    What is in the folder counts, not what ``latest`` says. Every rank reads a share of the files.

    Args:
        folder: ``checkpoints`` of the run.
        engine: For what the ranks tell each other.
        sound: Passes over checkpoints that an end forced between bad steps, as long as there is an older one.

    Returns:
        The checkpoint, or None if there is none at all.

    Raises:
        CheckpointError: There are checkpoints, but none is whole.
    """
    topology = engine.topology
    steps = json.loads(engine.gather_text(json.dumps(list_steps(folder)))[0])
    reasons: list[str] = []
    if sound:
        steps.sort(key=lambda step: (not within_bad_steps(step_folder(folder, step)), step))
    for step in reversed(steps):
        path = step_folder(folder, step)
        problem = _problem(path, topology.rank, topology.world_size)
        problems = [text for text in engine.gather_text(problem) if text]
        if not problems:
            _compare_pointer(folder, path)
            return path
        reasons.append(problems[0])
        if topology.rank == 0:
            logger.warning("Skipping %s: %s", path.name, problems[0])
    if reasons:
        raise CheckpointError(
            f"None of the {len(reasons)} checkpoints in {folder} is whole. The newest: {reasons[0]}",
            fix="Restore one from a copy, or set run.output to another folder to start anew.",
        )
    return None


def restore(folder: Path, engine: Engine, identity: Identity) -> RunState:
    """Continues from a checkpoint, whatever number of ranks and whichever engine wrote it.

    Args:
        folder: A whole checkpoint.
        engine: Its weights and optimizer state are set.
        identity: Of this run.

    Raises:
        CheckpointError: The checkpoint is of another model, tokenizer or data, or lacks something.
    """
    stored = native.read_json(folder / native.STATE)
    identity.refuse_other(stored["identity"], folder)
    manifest = native.read_manifest(folder)
    with native.open_source(folder) as source:
        from megatron_inherit.model.load import to_torch

        def read(name: str, kind: str, box: tuple[slice, ...]) -> torch.Tensor:
            return to_torch(source.read(name if kind == "weight" else f"{kind}:{name}", box))

        engine.restore(read, step_count=stored["updates"])
    if manifest["world_size"] == engine.topology.world_size:
        restore_random_state(native.read_extras(folder, engine.topology.rank))
    return RunState.from_json(stored["run"])


def stored_state(state: RunState, engine: Engine, identity: Identity, **more: Any) -> dict[str, Any]:
    """Gives the contents of state.json.

    Args:
        state: Where the run stands.
        engine: Tells its number of updates.
        identity: Of this run.
        more: What an export needs: ``hf_config``, ``licence``.
    """
    return {
        "run": state.to_json(),
        "updates": engine.step_count(),
        "model": dict(identity.model),
        "identity": identity.to_json(),
        **more,
    }


def _problem(path: Path, rank: int, world_size: int) -> str:
    try:
        native.verify(path, share=rank, shares=world_size)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    return ""


def _compare_pointer(folder: Path, chosen: Path) -> None:
    try:
        named = (folder / LATEST).read_text(errors="replace").strip()
    except OSError:
        named = ""
    if named != chosen.name:
        logger.warning("%s says %r; the newest whole checkpoint is %s.", folder / LATEST, named[:40], chosen.name)
