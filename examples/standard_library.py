"""Writes real text that every machine with Python has: its standard library and its language reference, as JSON lines.

python examples/standard_library.py OUT.jsonl
"""

import json
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
SHORTEST = 500


def documents():
    """Yields the modules by path, then the topics of the reference by title."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")
    for title in sorted(topics):
        yield topics[title]


def main(out: str) -> None:
    """Writes the file and says how much is in it."""
    count = size = 0
    with open(out, "w", encoding="utf-8") as file:
        for text in documents():
            if len(text) >= SHORTEST:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text)
    print(f"{out}: {count} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
