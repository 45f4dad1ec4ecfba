"""Tasks and suites by name: from local files where a data folder is given, else lm-eval's own."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.optional import require
from megatron_inherit.eval.harness.readers import Item, read_items


@dataclass(frozen=True)
class Suite:
    """Tasks with published results.

    Attributes:
        tasks: Task -> the metric that is compared.
        items: Task -> number of items behind the published figures.
        published: Model -> task -> value.
    """

    name: str
    tasks: dict[str, str]
    items: dict[str, int]
    published: dict[str, dict[str, float]]

    def error(self, task: str, value: float) -> float | None:
        """Binomial standard error of a published accuracy; None for a perplexity."""
        return math.sqrt(value * (1 - value) / self.items[task]) if value <= 1 else None


@functools.cache
def _table(name: str) -> dict[str, Any]:
    text = (resources.files("megatron_inherit.eval.harness") / name).read_text()
    return yaml.safe_load(text)


def local_tasks() -> dict[str, Any]:
    """Gives the table of tasks that can be read from files."""
    return _table("tasks.yaml")


def suite(name: str) -> Suite:
    """Gives a suite.

    Raises:
        UsageError: There is no such suite.
    """
    suites = _table("suites.yaml")
    if name not in suites:
        raise UsageError(f"There is no suite {name!r}.", expected=f"one of {', '.join(suites)}")
    return Suite(name, **suites[name])


def find_file(name: str, data_dir: Path) -> Path:
    """Finds a task's file below the data folder.

    Raises:
        UsageError: The task is unknown.
        DataError: None of the names it may have is there.
    """
    task = _known(name)
    found = next((data_dir / file for file in task["files"] if (data_dir / file).exists()), None)
    if found is None:
        raise DataError(
            f"The file of task {name!r} is missing in {data_dir}.",
            expected=" or ".join(task["files"]),
            fix="Put it there, or leave the task out.",
        )
    return found


def build_task(name: str, data_dir: Path) -> Any:
    """Makes an lm-eval task of a local file.

    Args:
        name: Key of tasks.yaml.
        data_dir: Folder of the files.

    Returns:
        ``lm_eval.api.task.ConfigurableTask``.
    """
    api = require("lm_eval.api.task", "'minherit evaluate'")
    task = _known(name)
    items = read_items(find_file(name, data_dir), task)
    config = {"task": name, "test_split": "test", "num_fewshot": 0, **_form(items[0]), **_scoring(name, task)}
    rows = require("datasets", "'minherit evaluate'").Dataset.from_list(items)
    return api.ConfigurableTask(config={**config, "custom_dataset": lambda **_: {"test": rows}})


def shots_of(name: str) -> int:
    """Number of examples in the prompts of a local task."""
    return int(_known(name).get("shots", 0))


def _known(name: str) -> dict[str, Any]:
    tasks = local_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        raise UsageError(
            f"There is no local task {name!r}.",
            expected=f"one of {', '.join(tasks)}",
            fix=f"Did you mean {near[0]!r}?" if near else "Without --data-dir lm-eval's own tasks can be named.",
        )
    return tasks[name]


def _form(item: Item) -> dict[str, Any]:
    """Tells lm-eval how to make requests of the items, from the fields they have."""
    if "page" in item:
        return {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": _detokenized}
    if "context" in item:
        return {
            "output_type": "loglikelihood",
            "doc_to_text": lambda item: item["context"],
            "doc_to_target": lambda item: " " + item["continuation"],
            "target_delimiter": "",
        }
    if "contexts" in item:
        return {
            "output_type": "multiple_choice",
            "doc_to_text": lambda item: item["gold"],
            "doc_to_target": lambda item: item["continuation"],
            "doc_to_choice": lambda item: item["contexts"],
        }
    return {
        "output_type": "multiple_choice",
        "doc_to_text": lambda item: item["query"],
        "doc_to_target": lambda item: item["gold"],
        "doc_to_choice": lambda item: item["choices"],
    }


_KINDS = {
    "acc": ("mean", True),
    "acc_norm": ("mean", True),
    "perplexity": ("perplexity", False),
    "word_perplexity": ("weighted_perplexity", False),
    "byte_perplexity": ("weighted_perplexity", False),
    "bits_per_byte": ("bits_per_byte", False),
}


def _scoring(name: str, task: dict[str, Any]) -> dict[str, Any]:
    metrics = ["acc"] if task["metrics"] == ["mc2"] else task["metrics"]
    listed = [
        {"metric": metric, "aggregation": _KINDS[metric][0], "higher_is_better": _KINDS[metric][1]}
        for metric in metrics
    ]
    own = {"truthfulqa": _truthfulqa_mass, "wikitext": _page_scores}.get(task["reader"])
    return {"metric_list": listed} | ({"process_results": own} if own else {})


def _truthfulqa_mass(item: Item, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Gives the share of probability on true answers (TruthfulQA's MC2)."""
    scores = np.array([score for score, _ in results])
    shares = np.exp(scores - scores.max())
    return {"acc": float(shares[: item["right"]].sum() / shares.sum())}


def _page_scores(item: Item, results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Gives a page's log-likelihood with its words and bytes, both counted before detokenization."""
    (score,) = results
    words, size = len(re.split(r"\s+", item["page"])), len(item["page"].encode())
    return {"word_perplexity": (score, words), "byte_perplexity": (score, size), "bits_per_byte": (score, size)}


_SPACING = (
    (r"s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in ("-", ",")),
    (r" @\.@ ", "."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def _detokenized(item: Item) -> str:
    """Undoes WikiText's tokenization, as everyone does since GPT-2's paper, rule for rule as lm-eval."""
    page = item["page"]
    for pattern, replacement in _SPACING:
        page = re.sub(pattern, replacement, page)
    return page
