"""Writes windows of a subset's training split as text: a random sample of it, which has seen nothing that is held out.

python examples/training_text.py SUBSET OUT.jsonl [TOKENS]
"""

import json
import sys

from megatron_inherit.data.inspection import sample_windows

LENGTH = 1024


def main(subset: str, out: str, tokens: str = "65536") -> None:
    """Decodes the first windows of the training order, one a line."""
    windows = sample_windows(subset, split="train", count=int(tokens) // LENGTH, sequence_length=LENGTH)
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": "".join(window.texts)}) + "\n" for window in windows)


if __name__ == "__main__":
    main(*sys.argv[1:])
