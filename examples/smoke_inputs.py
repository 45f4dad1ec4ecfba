"""Small stand-ins for what a cluster run reads: seven RedPajama-shaped files and one task, cut from JSON lines.

python examples/smoke_inputs.py LIBRARY.jsonl RAW_FOLDER TASK_FOLDER
"""

import json
import re
import sys
from pathlib import Path

FILES = (
    "arxiv_sample.jsonl",
    "book_sample.jsonl",
    "c4_sample.jsonl",
    "cc_2023-06_sample.jsonl",
    "github_sample.jsonl",
    "stackexchange_sample.jsonl",
    "wiki_sample.jsonl",
)
ITEMS = 16


def main(library: str, raw: str, tasks: str) -> None:
    """Deals the documents out, most to Common Crawl, and makes a last-word task of the first ones."""
    texts = [json.loads(line)["text"] for line in Path(library).read_text(encoding="utf-8").split("\n")[:-1]]
    piles = {name: texts[place :: 4 * len(FILES)] for place, name in enumerate(FILES)}
    piles["cc_2023-06_sample.jsonl"] = [t for i, t in enumerate(texts) if i % (4 * len(FILES)) >= len(FILES)]
    Path(raw).mkdir(parents=True, exist_ok=True)
    Path(tasks).mkdir(parents=True, exist_ok=True)
    for name, pile in piles.items():
        lines = [json.dumps({"text": text, "meta": {}}) for text in pile]
        Path(raw, name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = []
    for text in texts[:ITEMS]:
        context, _, word = re.sub(r"\s+", " ", text[:160]).rpartition(" ")
        items.append(json.dumps({"context": context, "continuation": word or "the"}))
    Path(tasks, "lambada_openai.jsonl").write_text("\n".join(items) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:4])
