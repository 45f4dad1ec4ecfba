"""One arm of a study: its start out of a teacher, its run in processes of its own, and what the run's files say.

A start appears whole or not at all, a finished run is only read, an unfinished one goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from megatron_inherit.arch.families import Role
from megatron_inherit.base.atomic import write_text
from megatron_inherit.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    DivergedError,
    MinheritError,
    PreemptedError,
    UsageError,
)
from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.config.load import flatten, to_yaml
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.data.indexed import bin_path
from megatron_inherit.eval.repair import fit_repair
from megatron_inherit.eval.repaired_plan import apply_repair, describe
from megatron_inherit.eval.runs import METRICS, Run, load_run, read_json, with_defaults
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.execute import RECORD, execute
from megatron_inherit.study.layers import resolve
from megatron_inherit.study.schema import CutSection, RepairSection
from megatron_inherit.study.width import cut_width
from megatron_inherit.train.run_folder import RunLock, clear_exit_status
from megatron_inherit.train.schedule import total_steps
from megatron_inherit.train.signals import SIGNALS
from megatron_inherit.train.start import RECIPE

logger = get_logger(__name__)

CONSOLE = "console.log"
POLL_SECONDS = 0.2
_ERRORS = (UsageError, ConfigError, DataError, CheckpointError, DivergedError, DiskError, PreemptedError)
_PATHS = ("model.path", "distill.teacher", "distill.cache")
_WITHOUT_EFFECT = (
    "run.name",
    "run.output",
    "checkpoint",
    "logging",
    "guard",
    "train.stop_after",
    "data.verify",
    "eval.micro_batch",
)
"""Keys, and sections, that change no figure of a run."""
_CHILD = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Program of a run's process: Linux asks it to save and end when the process that started it dies."""


def make_start(
    teacher: Path | str,
    folder: Path,
    *,
    layers: Sequence[int] | str,
    reset: Sequence[Role] = (),
    as_published: bool = False,
    seed: int = 0,
    cut: CutSection | None = None,
    repair: RepairSection | None = None,
) -> Path:
    """Writes what an arm starts from; a folder that is there already is left as it is.

    Args:
        teacher: A checkpoint of any format, or a run folder.
        folder: A Hugging Face folder with ``inherit.json``.
        layers: The teacher's blocks, or the words of ``--layers`` and of ``study.layers``.
        reset: Roles drawn anew.
        as_published: Copies what the released Inheritune scripts copy.
        seed: Of fresh values.
        cut: Shares of the width that are kept.
        repair: Fits to make before it is written.

    Raises:
        ConfigError: The folder holds another start.
        UsageError: Blocks or repairs are not understood.
    """
    asked = {
        "layers": layers if isinstance(layers, str) else list(layers),
        "reset": list(reset),
        "as_published": as_published,
        "seed": seed,
        "cut": None if cut is None else cut.model_dump(),
    } | ({} if repair is None else {"repair": repair.model_dump()})
    if (folder / RECORD).is_file():
        found = read_json(folder / RECORD).get("start")
        if found != asked:
            raise ConfigError(f"{folder} holds another start.", got=found, expected=asked, fix="Choose another folder.")
        return folder
    source = open_source(teacher)
    with contextlib.closing(source):
        chosen = resolve(layers, teacher, source.config.num_layers) if isinstance(layers, str) else tuple(layers)
        fitted = None if repair is None else fit_repair(teacher, chosen, repair.methods, text=repair.text)
        chosen = chosen if fitted is None else fitted.layers
        plan = plan_inheritance(source, layers=chosen, reset=reset, as_published=as_published, seed=seed)
        if cut is not None:
            plan = cut_width(plan, source, cut)
        record: dict[str, Any] = {"as_published": as_published, "start": asked}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="minherit-") as scratch:
            if repair is not None and fitted is not None:
                plan = apply_repair(plan, fitted, Path(scratch, "repair.safetensors"))
                record["repair"] = describe(fitted, repair.methods)
            execute(plan, folder, source=source, record=record)
    return folder


def is_finished(config: RunConfig) -> bool:
    """Tells whether a recipe's run has reached its last step; nothing is changed.

    Raises:
        ConfigError: Its folder holds a run of another recipe.
    """
    folder = Path(config.run.output)
    _refuse_other(config, folder)
    if read_json(folder / "exit_status.json").get("exit_code") != 0 or not (folder / METRICS).is_file():
        return False
    run = load_run(folder)
    done = run.evals if config.eval.windows else run.train
    return bool(done) and done[-1]["step"] == total_steps(config)


def missing_inputs(config: RunConfig) -> list[str]:
    """Names what a recipe reads and is not there: its data and its evaluation windows, by key."""
    data, windows = Path(config.data.path), config.eval.windows
    there = {f"data.path {data}": data.exists() or bin_path(data).exists()}
    there |= {} if windows is None else {f"eval.windows {windows}": Path(windows).exists()}
    return [name for name, found in there.items() if not found]


@dataclass
class Trainer:
    """Runs recipes in processes of their own, which end with it; as a context it hands signals on to them.

    It starts them from one thread, the main one.

    Attributes:
        processes: Of each run; more than one are started by torchrun.
    """

    processes: int = 1
    _running: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)
    _before: dict[signal.Signals, Any] = field(default_factory=dict)
    _stopped: bool = False

    def train(self, config: RunConfig) -> Run:
        """Trains a recipe to its end, from where its folder stands.

        Args:
            config: The recipe; ``run.output`` is the run's folder.

        Returns:
            What the run left in its folder.

        Raises:
            MinheritError: What ended the run, with its exit code; PreemptedError after a signal.
        """
        self.begin(config)
        while not self.is_over(config):
            time.sleep(POLL_SECONDS)
        return load_run(Path(config.run.output))

    def begin(self, config: RunConfig, *, devices: Sequence[int] | None = None) -> None:
        """Starts a run, or goes on with it, and returns; nothing is started where it is finished.

        Args:
            config: The recipe.
            devices: GPUs that the run sees; default all.
        """
        folder = Path(config.run.output)
        if is_finished(config):
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_holder(folder)
        if is_finished(config):
            return
        self.require_time(folder)
        write_text(folder / RECIPE, to_yaml(config))
        clear_exit_status(folder)  # how the session before ended is not how this one does
        environment = dict(os.environ)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices(devices, environment)
        self._running[folder] = self._launch(folder, environment)

    def is_over(self, config: RunConfig) -> bool:
        """Tells whether a run that was begun has ended.

        Raises:
            MinheritError: It ended without reaching its last step.
        """
        folder = Path(config.run.output)
        child = self._running.get(folder)
        if child is None:
            return True
        code = child.poll()
        if code is None:
            return False
        del self._running[folder]
        if code or not is_finished(config):
            raise _error_of(folder, code, stopped=self._stopped)
        return True

    def require_time(self, folder: Path) -> None:
        """Refuses to begin, or to wait for, a run once a signal came.

        Raises:
            PreemptedError: It came.
        """
        if self._stopped:
            raise PreemptedError(f"{folder} was not begun: a signal came.", fix="Run again to go on.")

    def stop(self) -> None:
        """Asks every run to save and end; no further one begins."""
        self._stopped = True
        for child in self._running.values():
            child.terminate()

    def __enter__(self) -> Trainer:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for child in self._running.values():
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _launch(self, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _CHILD, *self._module(), "train", str(folder / RECIPE)]
        with (folder / CONSOLE).open("ab") as console:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=environment
            )

    def _wait_for_holder(self, folder: Path) -> None:
        """Waits for a process of an earlier session that still saves into the folder."""
        lock, told = RunLock(folder), False
        while True:
            try:
                lock.acquire()
            except UsageError as error:
                if not told:
                    logger.info("Waiting. %s", error.what)
                told = True
                self.require_time(folder)
                time.sleep(1.0)
                continue
            lock.release()
            return

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def _module(self) -> list[str]:
        if self.processes == 1:
            return ["megatron_inherit"]
        return ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m", "megatron_inherit"]


def visible_devices(devices: Sequence[int], environment: Mapping[str, str]) -> str:
    """Names GPUs by their place among those that this process may see, which a scheduler may have chosen.

    Args:
        devices: Places, from 0, as torch counts them.
        environment: Of this process.
    """
    own = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(own[place] if own else str(place) for place in devices)


def _refuse_other(config: RunConfig, folder: Path) -> None:
    path = folder / RECIPE
    if not path.is_file() or not (folder / METRICS).is_file():
        return
    before = flatten(with_defaults(yaml.safe_load(path.read_text()) or {}))
    now = flatten(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key.startswith(_WITHOUT_EFFECT):
            continue
        if key not in _PATHS or _from_run(before, key) != _from_run(now, key):
            raise ConfigError(
                f"{folder} holds a run of another recipe: {key} differs.",
                got=before.get(key),
                expected=now.get(key),
                fix="Choose another folder, or delete that one.",
            )


def _from_run(values: Mapping[str, Any], key: str) -> str | None:
    """Gives a path as seen from the run's folder, so that a study's folder may be moved or named otherwise."""
    value = values.get(key)
    return None if value is None else os.path.relpath(value, values["run.output"])


def error_kind(code: int) -> type[MinheritError]:
    """Gives the error that an exit code stands for."""
    return next((error for error in _ERRORS if error.exit_code == code), MinheritError)


def _error_of(folder: Path, code: int, *, stopped: bool) -> MinheritError:
    """Gives the error that ended a run, from its own last word or the end of what it printed."""
    reason = read_json(folder / "exit_status.json").get("reason")
    if not reason or reason == "done":
        reason = " / ".join((folder / CONSOLE).read_text(errors="replace").strip().splitlines()[-1:]) or "no message"
    kind = PreemptedError if stopped else error_kind(code)
    return kind(f"{folder}: {reason}", fix=f"What it printed is in {folder / CONSOLE}.")
