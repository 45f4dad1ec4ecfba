"""TensorBoard, Weights & Biases, trackio and MLflow behind ``log(values, step)``; nothing is sent unless asked to be.

wandb runs offline unless ``WANDB_MODE`` says otherwise; MLflow writes files into the run's folder unless
``MLFLOW_TRACKING_URI`` is set; trackio keeps its own local database. What each calls the run stands in
``loggers.json`` of its folder, so that a run that goes on goes on there too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import MissingExtraError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.train.metrics import MetricsLogger

logger = get_logger(__name__)

RUN_IDS = "loggers.json"


class RunLogger(MetricsLogger, Protocol):
    """A logger of one run; ``run_id`` is what it calls the run, empty where the folder says it all."""

    run_id: str


class OpenLogger(Protocol):
    """Opens a logger; ``run_id`` is empty for a new run."""

    def __call__(
        self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str = ""
    ) -> RunLogger:
        """Raises whatever the logger's package raises, for a run that is not there any more too."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run."""

    run_id = ""

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str = "") -> None:
        require("tensorboard", "logging.loggers=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class Wandb:
    """A run of wandb in ``wandb/`` of the run; offline each session is a folder there, all of one id."""

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str = "") -> None:
        wandb = require("wandb", "logging.loggers=wandb")
        more = {"id": run_id, "resume": "allow"} if run_id else {}
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config), mode=mode, **more)
        self.run_id: str = self._run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of trackio's local dashboard.

    trackio finds a run by its name, the newest of several; where that is another one, a new run is begun.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str = "") -> None:
        self._trackio = require("trackio", "logging.loggers=trackio")
        resume = "must" if run_id else "never"
        run = self._trackio.init(project=project, name=name, config=dict(config), resume=resume, embed=False)
        self.run_id: str = run.id
        if run_id and run.id != run_id:
            raise LookupError(f"another run of {project} was named {name} since")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._trackio.finish()


class MLflow:
    """A run of MLflow, in ``mlruns/`` of the run unless a server is named.

    The files need no database package, which ``mlflow-skinny`` does not bring; MLflow 3 wants to be told that they are
    meant. ``mlflow ui --backend-store-uri RUN/mlruns`` of the full package shows them.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str = "") -> None:
        self._mlflow = require("mlflow", "logging.loggers=mlflow")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder.absolute() / "mlruns").as_uri()
        self._mlflow.set_tracking_uri(place)
        self._mlflow.set_experiment(project)
        self.run_id: str = self._mlflow.start_run(run_id=run_id or None, run_name=name).info.run_id
        self._mlflow.log_dict(dict(config), "run.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


LOGGERS: Mapping[str, OpenLogger] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def open_loggers(
    names: tuple[str, ...],
    folder: Path,
    *,
    project: str,
    run: str,
    config: Mapping[str, Any],
    resumed: bool = False,
) -> dict[str, MetricsLogger]:
    """Opens loggers by name; one that fails to open is told of and left out.

    Args:
        names: Keys of ``LOGGERS``.
        folder: The run's folder.
        project: What the run is filed under.
        run: The run's name.
        config: The resolved recipe.
        resumed: The run goes on, in the runs that it had; one that is gone is begun anew.

    Raises:
        MissingExtraError: A logger's package is not installed.
    """
    known = _read_ids(folder / RUN_IDS) if resumed else {}
    opened: dict[str, MetricsLogger] = {}
    ids = dict(known)
    for name in names:
        found = _open(name, folder, project, run, config, known.get(name, ""))
        if found is not None:
            opened[name] = found
            ids[name] = found.run_id
    if names:
        write_json(folder / RUN_IDS, {name: run_id for name, run_id in ids.items() if run_id})
    return opened


def _open(name: str, folder: Path, project: str, run: str, config: Mapping[str, Any], run_id: str) -> RunLogger | None:
    for wanted in (run_id, "") if run_id else ("",):
        try:
            return LOGGERS[name](folder, project=project, name=run, config=config, run_id=wanted)
        except MissingExtraError:
            raise
        except Exception as error:
            what = (
                f"cannot go on with its run {wanted} and begins a new one"
                if wanted
                else "cannot be opened and is left out"
            )
            logger.warning("The logger %s %s: %s: %s", name, what, type(error).__name__, error)
    return None


def _read_ids(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): str(run_id) for name, run_id in value.items()} if isinstance(value, dict) else {}
