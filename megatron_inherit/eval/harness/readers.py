"""Items of benchmark files on disk, in the few shapes that the scoring needs.

A reader gives a list of dictionaries: ``query``, ``choices``, ``gold`` (multiple choice), ``contexts``,
``continuation``, ``gold`` (schemas scored on the common ending), ``context``, ``continuation`` (cloze) or ``page``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError
from megatron_inherit.base.optional import require

Item = dict[str, Any]
Task = Mapping[str, Any]


def read_items(path: Path, task: Task) -> list[Item]:
    """Reads a task's file.

    Args:
        path: The file, or the folder of a task that has several.
        task: Its entry of tasks.yaml.

    Raises:
        DataError: The file is empty, damaged, or lacks a field.
    """
    try:
        items = READERS[task["reader"]](path, task)
    except (KeyError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} does not have the form of a {task['reader']!r} file: {type(error).__name__} {error}.",
            fix="See the documentation of 'minherit evaluate' for the fields of each task's file.",
        ) from error
    if not items:
        raise DataError(f"{path} holds no item.")
    return items


def _choice(path: Path, task: Task) -> list[Item]:
    start, end = task.get("remove", ""), task.get("after", "")
    return [
        {"query": row["query"].strip().removeprefix(start) + end, "choices": row["choices"], "gold": int(row["gold"])}
        for row in _json_lines(path)
    ]


def _schema(path: Path, task: Task) -> list[Item]:
    return [
        {"contexts": row["context_options"], "continuation": row["continuation"], "gold": int(row["gold"])}
        for row in _json_lines(path)
    ]


def _cloze(path: Path, task: Task) -> list[Item]:
    return [{"context": row["context"], "continuation": row["continuation"]} for row in _json_lines(path)]


def _superglue_wsc(path: Path, task: Task) -> list[Item]:
    return [_wsc_item(row) for row in _json_lines(path)]


def _wsc_item(row: Item) -> Item:
    target, text = row["target"], row["text"]
    before = " ".join(text.split()[: target["span2_index"]])
    pronoun, noun = target["span2_text"], target["span1_text"]
    detokenize = require("lm_eval.utils", "'minherit evaluate'").general_detokenize
    passage = detokenize(f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1 :]}")
    question = f'In the passage above, does the pronoun "*{pronoun}*" refer to "*{noun}*"?'
    query = f"Passage: {passage}\nQuestion: {question}\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row["label"])}


def _hellaswag(path: Path, task: Task) -> list[Item]:
    return [
        {
            "query": _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            "choices": [_without_brackets(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }
        for row in _json_lines(path)
    ]


def _without_brackets(text: str) -> str:
    """Takes out the marks that the WikiHow part of HellaSwag left behind."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _glue(path: Path, task: Task) -> list[Item]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    one, two, label = task["columns"]
    return [
        {
            "query": task["template"].format(first=row[one], second=_ended(row[two], task)),
            "choices": task["answers"],
            "gold": task["labels"].index(row[label]),
        }
        for row in rows
        if row[label] != "-"  # MNLI's items without agreement
    ]


def _ended(text: str, task: Task) -> str:
    if not task.get("full_stop"):
        return text
    return text.strip() if text.strip().endswith(".") else text.strip() + "."


TRUTHFULQA_PROMPT = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.
"""


def _truthfulqa(path: Path, task: Task) -> list[Item]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    items = []
    for row in rows:
        right = [answer.strip() for answer in row["Correct Answers"].split(";") if answer.strip()]
        wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";") if answer.strip()]
        query = f"{TRUTHFULQA_PROMPT}\nQ: {row['Question'].strip()}\nA:"
        items.append({"query": query, "choices": right + wrong, "gold": 0, "right": len(right)})
    return items


def _mmlu(path: Path, task: Task) -> list[Item]:
    """Reads the folders ``dev`` and ``test`` of the original release; the shots are the dev items, in their order."""
    items = []
    for test in sorted((path / "test").glob("*_test.csv")):
        subject = test.name.removesuffix("_test.csv")
        title = " ".join(subject.split("_"))
        parts = [f"The following are multiple choice questions (with answers) about {title}."]
        parts += [f"{query} {'ABCD'[gold]}" for query, gold in _mmlu_rows(path / "dev" / f"{subject}_dev.csv")][:5]
        shots = "\n\n".join(parts)
        items += [
            {"query": f"{shots}\n\n{query}", "choices": list("ABCD"), "gold": gold} for query, gold in _mmlu_rows(test)
        ]
    return items


def _mmlu_rows(path: Path) -> Iterator[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        for question, *options, answer in csv.reader(file):
            lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
            yield "\n".join([question.strip(), *lines, "Answer:"]), "ABCD".index(answer.strip())


def _wikitext(path: Path, task: Task) -> list[Item]:
    """Cuts the file at its top-level titles: one page an item, as lm-eval's document-level set has it."""
    pages = re.split(r"(?m)^(?= = [^=].*[^=] = \n)", path.read_text(encoding="utf-8"))
    return [{"page": page} for page in pages if page.strip()]


def _json_lines(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


READERS: Mapping[str, Callable[[Path, Task], list[Item]]] = {
    "choice": _choice,
    "schema": _schema,
    "cloze": _cloze,
    "superglue_wsc": _superglue_wsc,
    "hellaswag": _hellaswag,
    "glue": _glue,
    "truthfulqa": _truthfulqa,
    "mmlu": _mmlu,
    "wikitext": _wikitext,
}
