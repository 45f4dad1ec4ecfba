"""Writes windows of a subset's training split as text: what is fitted on them has seen nothing that is held out.

python examples/training_text.py SUBSET OUT.jsonl
"""

import json
import sys

from megatron_inherit.data.inspection import sample_windows

WINDOWS, TOKENS = 64, 1024


def main(subset: str, out: str) -> None:
    """Decodes the first windows of the training order, one document a line."""
    windows = sample_windows(subset, split="train", count=WINDOWS, sequence_length=TOKENS)
    with open(out, "w", encoding="utf-8") as file:
        for window in windows:
            file.writelines(json.dumps({"text": text}) + "\n" for text in window.texts)


if __name__ == "__main__":
    main(*sys.argv[1:3])
