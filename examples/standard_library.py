"""Writes real text that every machine with Python has, as JSON lines: its standard library and its language reference.

python examples/standard_library.py OUT.jsonl
python examples/standard_library.py OUT.jsonl --held-out VALID.jsonl   # the top folder's modules; their last 5% apart
"""

import argparse
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
SHORTEST = 500
HELD_OUT = 0.05


def library():
    """Yields the modules by path, then the topics of the reference by title."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")
    for title in sorted(topics):
        yield topics[title]


def top_modules():
    """Yields the modules of the top folder by path."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def cut(texts, place):
    """Gives the texts before a character and those after it, the one that it lies in on both sides."""
    before, after = [], []
    for text in texts:
        before.append(text[: max(place, 0)])
        after.append(text[max(place, 0) :])
        place -= len(text)
    return before, after


def write(out, texts):
    """Writes the texts that are not empty and says how much is in them."""
    texts = [text for text in texts if text]
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print(f"{out}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB")


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--held-out")
    options = parser.parse_args()
    if not options.held_out:
        write(options.out, [text for text in library() if len(text) >= SHORTEST])
        return
    modules = list(top_modules())
    train, valid = cut(modules, int(sum(map(len, modules)) * (1 - HELD_OUT)))
    write(options.out, train)
    write(options.held_out, valid)


if __name__ == "__main__":
    main()
