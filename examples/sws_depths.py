"""Draws the losses of descendants before any training against their depth, one line an arm, and prints the table.

python examples/sws_depths.py WORK OUT.png
"""

import json
import sys
from pathlib import Path

from megatron_inherit.eval.plots import points, to_png


def main(work: str, out: str) -> None:
    """Reads every family.json below WORK."""
    lines: dict[str, dict[int, float]] = {}
    for path in sorted(Path(work).glob("*/family/family.json")):
        members = json.loads(path.read_text())["members"]
        lines[path.parts[-3]] = {row["depth"]: row["loss"] for row in members}
    depths = sorted({depth for losses in lines.values() for depth in losses})
    width = max(map(len, lines))
    print(f"{'':<{width}}  " + "  ".join(f"{depth:>6}" for depth in depths))
    for name, losses in lines.items():
        print(f"{name:<{width}}  " + "  ".join(f"{losses[depth]:6.3f}" for depth in depths))
    groups = {name: [(depth, loss, None) for depth, loss in losses.items()] for name, losses in lines.items()}
    figure = points(groups, xlabel="layers of the descendant", ylabel="loss before any training (nats a byte)")
    Path(out).write_bytes(to_png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:3])
