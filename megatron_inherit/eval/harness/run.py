"""``minherit evaluate``: lm-eval on a checkpoint, offline, with errors and a comparison with published results."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.eval.harness.tasks import Suite, build_task, find_file, local_tasks, shots_of, suite
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer

_log = get_logger(__name__)


@dataclass(frozen=True)
class Row:
    """One task's result.

    Attributes:
        value: Accuracy as a fraction, or a perplexity.
        stderr: lm-eval's standard error, None where the metric has none.
        items: Items that were scored.
        published: Model -> (value, binomial standard error or None).
    """

    task: str
    metric: str
    shots: int
    items: int
    value: float
    stderr: float | None
    published: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def plan_tasks(
    tasks: Sequence[str], suite_name: str | None, data_dir: Path | None, *, skip_missing: bool = False
) -> tuple[list[str], Suite | None]:
    """Settles which tasks run, before a model is loaded.

    Raises:
        UsageError: Nothing or too much is asked for, or a name is unknown.
        DataError: A task's file is missing.
    """
    if bool(tasks) == bool(suite_name):
        raise UsageError("Give either --tasks or --suite.", fix="For instance --tasks piqa,arc_easy --data-dir DIR.")
    chosen = suite(suite_name) if suite_name else None
    names = list(chosen.tasks) if chosen else list(tasks)
    if data_dir is None:
        if chosen is None:
            _require_known(names)
        return names, chosen
    if not Path(data_dir).is_dir():
        raise DataError(f"{data_dir} is not a folder.", fix="Give the folder of the tasks' files as --data-dir.")
    missing = [name for name in names if not _there(name, Path(data_dir))]
    if missing and not (skip_missing and len(missing) < len(names)):
        files = "; ".join(f"{name}: {' or '.join(local_tasks()[name]['files'])}" for name in missing)
        raise DataError(
            f"Files of {len(missing)} of {len(names)} tasks are missing in {data_dir}.",
            expected=files,
            fix="Put them there, or pass --skip-missing to score the others.",
        )
    for name in missing:
        _log.warning("Task %s is left out: its file is missing.", name)
    return [name for name in names if name not in missing], chosen


def evaluate(
    model: Any,
    tasks: Sequence[str],
    *,
    chosen: Suite | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> list[Row]:
    """Scores a model.

    Args:
        model: An lm-eval ``LM``: ``harness.lm.LogitsModel`` of a folder or of an engine.
        tasks: Names: of tasks.yaml with ``data_dir``, of lm-eval without.
        chosen: The suite whose published figures stand beside ours.
        data_dir: Folder of local files.
        limit: First items of each task only.
        shots: Examples in the prompt of lm-eval's own tasks; default the suite's, else lm-eval's.

    Returns:
        A row a metric; none on a node's processes beyond its first, where lm-eval gives no results. A tag of lm-eval,
        or a YAML file of its form, gives the rows of the tasks that it names.

    Raises:
        DataError: The data of lm-eval's own tasks is not in its cache.
    """
    quiet()
    harness = require("lm_eval", "'minherit evaluate'")
    rows: list[Row] = []
    for number, names in _by_shots(tasks, chosen, shots, local=data_dir is not None).items():
        built: list[Any] = [build_task(name, data_dir) for name in names] if data_dir is not None else names
        with contextlib.redirect_stdout(sys.stderr), _data_named():
            results = harness.simple_evaluate(
                model=model,
                tasks=built,
                limit=limit,
                num_fewshot=number,
                task_manager=_manager(local=data_dir is not None),
                log_samples=False,
                bootstrap_iters=1000,
            )
        if results is not None:
            rows += _rows(results, names, chosen, local=data_dir is not None)
    return rows


def require_data(tasks: Sequence[str]) -> None:
    """Opens the data of lm-eval's own tasks, so that what is missing is said before a model is in training.

    Raises:
        DataError: It is not in lm-eval's cache.
    """
    quiet()
    with contextlib.redirect_stdout(sys.stderr), _data_named():
        _manager(local=False).load(list(tasks))


def _by_shots(
    tasks: Sequence[str], chosen: Suite | None, shots: int | None, *, local: bool
) -> dict[int | None, list[str]]:
    """Puts tasks together that have equally many examples in their prompts; None leaves that to lm-eval or the file."""
    together: dict[int | None, list[str]] = {}
    for name in tasks:
        number = shots if shots is not None or chosen is None else (shots_of(name) or None)
        together.setdefault(None if local else number, []).append(name)
    return together


@functools.cache
def _manager(*, local: bool) -> Any:
    """Gives lm-eval's list of tasks, which takes seconds to read; an empty one for tasks of local files."""
    quiet()
    return require("lm_eval.tasks", "'minherit evaluate'").TaskManager(include_defaults=not local)


def _require_known(names: Sequence[str]) -> None:
    known = _manager(local=False).all_tasks
    for name in names:
        if name not in known and "*" not in name and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"lm-eval has no task {name!r}.",
                fix=f"Did you mean {near[0]!r}?" if near else "'lm-eval ls tasks' lists them; or pass --data-dir.",
            )


@contextlib.contextmanager
def _data_named() -> Iterator[None]:
    """Says what is to be done where the data of a task cannot be had."""
    try:
        yield
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "find cache" not in str(error):
            raise
        raise DataError(
            f"lm-eval cannot get at the data of its tasks: {error}.",
            fix="Give a folder of task files as --data-dir (eval.tasks.data_dir in a recipe), or fill lm-eval's cache "
            "on a machine with a network.",
        ) from error


def quiet() -> None:
    """Keeps lm-eval off the network, and its notes about itself, and bars where nobody watches, off the screen.

    To be called before lm-eval is imported. Its bootstrap stays in this process: a training's children would inherit
    its handling of signals and never end.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _there(name: str, data_dir: Path) -> bool:
    try:
        find_file(name, data_dir)
    except DataError:
        return False
    return True


def _rows(results: Any, tasks: Sequence[str], chosen: Suite | None, *, local: bool) -> Iterator[Row]:
    for name in _shown(results, tasks):
        found = results["results"][name]
        values = {key.split(",")[0]: value for key, value in found.items() if isinstance(value, float | int)}
        errors = {key: values.pop(key) for key in list(values) if key.endswith("_stderr")}
        size = sum(results["n-samples"].get(part, {}).get("effective", 0) for part in _parts(results, name))
        for metric, value in values.items():
            if metric not in _METRICS:
                continue
            shown = "mc2" if name == "truthfulqa_mc2" else metric
            error = errors.get(f"{metric}_stderr")
            yield Row(
                task=name,
                metric=shown,
                shots=shots_of(name) if local else int(results["n-shot"].get(name, 0)),
                items=int(size),
                value=float(value),
                stderr=float(error) if isinstance(error, float | int) else None,
                published=_published(chosen, name, shown),
            )


def _shown(results: Any, tasks: Sequence[str]) -> list[str]:
    """Gives the tasks and groups that were named, and of a tag or file what it named; not the members of a group."""
    inside = {part for parts in results["group_subtasks"].values() for part in parts}
    named = [name for name in tasks if name in results["results"]]
    return named + [name for name in results["results"] if name not in named and name not in inside]


def _parts(results: Any, name: str) -> list[str]:
    """Gives the tasks of a group, of groups in it too; a task itself."""
    parts = results["group_subtasks"].get(name)
    return [name] if not parts else [task for part in parts for task in _parts(results, part)]


_METRICS = ("acc", "acc_norm", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "exact_match", "f1")


def _published(chosen: Suite | None, task: str, metric: str) -> dict[str, tuple[float, float | None]]:
    if chosen is None or chosen.tasks.get(task) != metric:
        return {}
    rows = chosen.published.items()
    return {model: (values[task], chosen.error(task, values[task])) for model, values in rows if task in values}


def to_json(
    rows: Sequence[Row], *, checkpoint: str, weights: str, chosen: Suite | None, limit: int | None, device: str
) -> dict[str, Any]:
    """Gives the results file: rows, what was scored (of a run: which of its checkpoints), with what and when."""
    import lm_eval
    import torch
    import transformers

    versions = {"lm-eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "checkpoint": checkpoint,
        "weights": weights,
        "suite": chosen.name if chosen else None,
        "limit": limit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu ({platform.machine()})",
        "versions": versions,
        "published_names": list(chosen.published) if chosen else [],
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row], chosen: Suite | None) -> list[list[str]]:
    """Gives the comparison as lines of cells, the header first."""
    names = list(chosen.published) if chosen else []
    lines = [["task", "metric", "shots", "items", "value", *names]]
    for row in rows:
        cells = [row.task, row.metric, str(row.shots), str(row.items), _figure(row.value, row.stderr)]
        lines.append(cells + [_figure(*row.published[name]) if name in row.published else "" for name in names])
    return lines


def _figure(value: float, error: float | None) -> str:
    digits = 3 if abs(value) <= 1 else 2
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def hf_model(folder: Path, *, device: str, dtype: str, batch_size: int | str = "auto") -> Any:
    """Loads a Hugging Face folder as an lm-eval model, without the network.

    Args:
        folder: Model and tokenizer.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
        batch_size: Windows of full length in a batch; ``auto`` starts large on a GPU and halves when it does not fit,
            and takes what the free memory holds on a CPU.
    """
    quiet()
    require("lm_eval", "'minherit evaluate'")
    from megatron_inherit.eval.harness.lm import LARGEST_BATCH, LogitsModel, hf_logits, window_of

    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device=device, dtype=dtype)
    window = window_of(getattr(model.config, "max_position_embeddings", None))
    tokens = LARGEST_BATCH if batch_size == "auto" else int(batch_size) * window
    if batch_size == "auto" and device == "cpu":
        tokens = cpu_batch_tokens(model.config.vocab_size, free=_free_memory())
    return LogitsModel(hf_logits(model), tokenizer, max_length=window, batch_tokens=tokens)


def cpu_batch_tokens(vocab_size: int, *, free: int) -> int:
    """Chooses the tokens of a batch on a CPU: a quarter of the free memory may go to logits in fp32, held twice.

    Args:
        vocab_size: Width of the logits.
        free: Free memory in bytes.

    Returns:
        Between 256 and 8192: beyond that a CPU gains nothing.
    """
    return max(256, min(8192, free // 4 // (2 * 4 * vocab_size)))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
