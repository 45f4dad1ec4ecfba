"""TensorBoard, Weights & Biases, trackio and MLflow behind ``log(values, step)``; nothing is sent unless asked to be.

wandb runs offline unless ``WANDB_MODE`` says otherwise; MLflow writes files into the run's folder unless
``MLFLOW_TRACKING_URI`` is set; trackio keeps its own local database.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import MissingExtraError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.train.metrics import MetricsLogger

logger = get_logger(__name__)


class TensorBoard:
    """Event files in ``tensorboard/`` of the run."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
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
    """A run of wandb in ``wandb/`` of the run."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "logging.loggers=wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config), mode=mode)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of trackio's local dashboard."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = require("trackio", "logging.loggers=trackio")
        self._trackio.init(project=project, name=name, config=dict(config), embed=False)

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

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow = require("mlflow", "logging.loggers=mlflow")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder.absolute() / "mlruns").as_uri()
        self._mlflow.set_tracking_uri(place)
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(config), "run.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


LOGGERS: Mapping[str, Callable[[Path, str, str, Mapping[str, Any]], MetricsLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def open_loggers(
    names: tuple[str, ...], folder: Path, *, project: str, run: str, config: Mapping[str, Any]
) -> dict[str, MetricsLogger]:
    """Opens loggers by name; one that fails to open is told of and left out.

    Args:
        names: Keys of ``LOGGERS``.
        folder: The run's folder.
        project: What the run is filed under.
        run: The run's name.
        config: The resolved recipe.

    Raises:
        MissingExtraError: A logger's package is not installed.
    """
    opened = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name](folder, project, run, config)
        except MissingExtraError:
            raise
        except Exception as error:
            logger.warning("The logger %s cannot be opened and is left out: %s: %s", name, type(error).__name__, error)
    return opened
