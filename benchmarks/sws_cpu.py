"""Reads what examples/sws_cpu.sh left behind: orders of stages before training, rows, figures for its page.

python benchmarks/sws_cpu.py orders LEARNGENE WINDOWS OUT.json
python benchmarks/sws_cpu.py collect WORK [--text NAME] [--rows NAME]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import append_rows, circumstances

ARMS = {"sws": "SWS", "no-stages": "no stage information", "no-guidance": "no expansion guidance", "scratch": "scratch"}
"""Name in folders -> label in figures."""

Key = tuple[str, str, int, str, int]
"""What was measured, arm, depth, placement, optimizer steps."""


def orders(learngene: str, windows: str, out: str) -> None:
    """Measures where the remainder goes at depth 6, and two wrong orders at depth 8, before any training."""
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.data.windows import EvalWindows
    from megatron_inherit.sharing.expand import place
    from megatron_inherit.sharing.learngene import require_plan
    from megatron_inherit.sharing.probe import probe_placements

    with open_source(learngene) as source:
        plan = require_plan(source)
        placements = {(6, rule): place(plan, 6, rule) for rule in ("front", "middle", "back")}
        own = place(plan, 8, "proportional")
        placements |= {(8, "own"): own, (8, "reversed"): own[::-1], (8, "interleaved"): (0, 1, 2, 3) * 2}
        tokens = EvalWindows.load(windows).tokens
        rows = []
        for depth in (6, 8):
            here = {stages: name for (layers, name), stages in placements.items() if layers == depth}
            for stages, loss in probe_placements(source, here, tokens).items():
                rows.append({"depth": depth, "placement": here[stages], "loss": loss})
                print(f"{loss:.4f} nats  {depth} layers, {here[stages]}: {','.join(map(str, stages))}")
    Path(out).write_text(json.dumps(rows, indent=2) + "\n")


def measured(work: Path) -> Iterable[tuple[Key, str, float]]:
    """Yields key, seed and loss of everything that the example measured."""
    for path in sorted(work.glob("*-seed*/family/family.json")):
        arm, seed = path.parts[-3].rsplit("-seed", 1)
        for row in json.loads(path.read_text())["members"]:
            yield ("zero-tuning", arm, row["depth"], "front", 0), seed, row["loss"]
    for path in sorted(work.glob("*-seed*/orders.json")):
        arm, seed = path.parts[-2].rsplit("-seed", 1)
        for row in json.loads(path.read_text()):
            yield ("order", arm, row["depth"], row["placement"], 0), seed, row["loss"]
    for path in sorted(work.glob("*-seed*/auxiliary/metrics.jsonl")):
        arm, seed = path.parts[-3].rsplit("-seed", 1)
        last = evaluations(path)[-1]
        yield ("auxiliary", arm, 4 if arm == "no-guidance" else 8, "own", last["step"]), seed, last["loss"]
    for path in sorted(work.glob("runs/L*/metrics.jsonl")):
        depth, name = path.parts[-2].removeprefix("L").split("-", 1)
        arm, seed = name.rsplit("-seed", 1)
        for row in evaluations(path):
            placement = "" if arm == "scratch" else "front"
            yield ("fine-tuning", arm, int(depth), placement, row["step"]), seed, row["loss"]
    last = evaluations(work / "teacher" / "metrics.jsonl")[-1]
    yield ("teacher", "teacher", 6, "", last["step"]), "1", last["loss"]


def evaluations(path: Path) -> list[dict[str, Any]]:
    """Gives the evaluations of a run."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "eval"]


def recipe(work: Path) -> dict[str, Any]:
    """Gives what auxiliaries of published runs differ in."""
    import yaml

    path = next(iter(sorted(work.glob("sws-seed*/auxiliary/run.yaml"))))
    values = yaml.safe_load(path.read_text())
    decay = values["optimizer"]["weight_decay"]
    return {"warmup_steps": values["schedule"]["warmup_steps"], "weight_decay": decay}


def collect(work: Path, text: str, rows_name: str, seconds: int) -> None:
    """Writes the rows, the figures and the files that ``minherit report --analysis`` takes; prints the tables."""
    found: dict[Key, dict[str, float]] = {}
    for key, seed, loss in measured(work):
        found.setdefault(key, {})[seed] = loss
    common = {"text": text} | recipe(work) | circumstances("torch", "megatron-core")
    names = ("what", "arm", "depth", "placement", "steps")
    rows = [
        {**dict(zip(names, key, strict=True)), "seed": seed, "loss_nats_per_byte": round(loss, 4), **common}
        for key, losses in found.items()
        for seed, loss in sorted(losses.items())
    ]
    if seconds:
        rows.append({"what": "study", "seconds": seconds, **common})
    (work / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    if rows_name:
        print(append_rows(rows_name, rows))
    draw(work, "depths", depth_figure(found))
    for depth in (6, 10):
        draw(work, f"tuning-{depth:02d}", tuning_figure(work, found, depth))
    print_tables(found)


def depth_figure(found: Mapping[Key, Mapping[str, float]]) -> dict[str, Any]:
    """Gives the losses before any training against the depth."""
    groups = {
        label: [
            (key[2], *summary(losses))
            for key, losses in sorted(found.items(), key=lambda item: item[0][2])
            if key[:2] == ("zero-tuning", arm)
        ]
        for arm, label in ARMS.items()
        if arm != "scratch"
    }
    teacher = next(losses["1"] for key, losses in found.items() if key[0] == "teacher")
    return {
        "kind": "points",
        "name": "depths",
        "title": "Before any training, by depth",
        "note": "Mean of the seeds, bars: half of their distance. The remainder of the depth goes to the first stages.",
        "xlabel": "layers of the descendant",
        "ylabel": "validation loss (nats a byte)",
        "groups": groups,
        "reference": ["teacher", teacher],
    }


def tuning_figure(work: Path, found: Mapping[Key, Mapping[str, float]], depth: int) -> dict[str, Any]:
    """Gives the losses of one depth against the tokens seen; scratch, much longer, as the line where it ends."""
    tokens = {row["step"]: row["tokens"] for path in work.glob("runs/L*/metrics.jsonl") for row in evaluations(path)}
    rows = {
        arm: sorted(
            (key[4], *summary(losses)) for key, losses in found.items() if key[:3] == ("fine-tuning", arm, depth)
        )
        for arm in ARMS
    }
    last, end, _ = rows.pop("scratch")[-1]
    curves = [
        {
            "label": ARMS[arm],
            "x": [tokens[step] for step, _, _ in values],
            "y": [mean for _, mean, _ in values],
            "error": [half for _, _, half in values],
        }
        for arm, values in rows.items()
    ]
    return {
        "kind": "curves",
        "name": f"tuning-{depth:02d}",
        "title": f"Training {depth} layers",
        "note": "Mean of the seeds, bands: half of their distance.",
        "curves": curves,
        "reference": [f"scratch, {last} steps", end],
    }


def summary(losses: Mapping[str, float]) -> tuple[float, float]:
    """Gives the mean over the seeds and half of their distance."""
    values = list(losses.values())
    return statistics.fmean(values), (max(values) - min(values)) / 2


def draw(work: Path, name: str, figure: Mapping[str, Any]) -> None:
    """Writes a figure's values and its picture."""
    from megatron_inherit.eval.analysis_charts import drawings_of
    from megatron_inherit.eval.plots import to_png

    (work / f"{name}.json").write_text(json.dumps(figure, indent=1) + "\n")
    (work / f"{name}.png").write_bytes(to_png(drawings_of(figure)[0].draw(wide=True)))


def print_tables(found: Mapping[Key, Mapping[str, float]]) -> None:
    """Prints the rows as Markdown, mean and half of the seeds' distance."""
    table = functools.partial(cells, found)
    depths = sorted({key[2] for key in found if key[0] == "zero-tuning"})
    print(
        "\n| before any training, layers | " + " | ".join(map(str, depths)) + " |\n" + "|---" * (len(depths) + 1) + "|"
    )
    for arm in ("sws", "no-stages", "no-guidance"):
        print(f"| {ARMS[arm]} | " + " | ".join(table("zero-tuning", arm, depth, "front", 0) for depth in depths) + " |")
    print("\n| SWS before any training | loss |\n|---|---|")
    for key in (key for key in found if key[0] == "order"):
        print(f"| {key[2]} layers, {key[3]} | {table(*key)} |")
    steps = sorted({key[4] for key in found if key[0] == "fine-tuning"})
    for depth in (6, 10):
        print(heading(f"{depth} layers, steps", steps))
        for arm, label in ARMS.items():
            placement = "" if arm == "scratch" else "front"
            print(f"| {label} | " + " | ".join(table("fine-tuning", arm, depth, placement, s) for s in steps) + " |")


def heading(first: str, columns: Sequence[Any]) -> str:
    """Writes the two lines that a table begins with."""
    return f"\n| {first} | " + " | ".join(map(str, columns)) + " |\n" + "|---" * (len(columns) + 1) + "|"


def cells(found: Mapping[Key, Mapping[str, float]], *key: Any) -> str:
    """Writes one cell of a table."""
    losses = found.get(key)
    if losses is None:
        return ""
    mean, half = summary(losses)
    return f"{mean:.3f} ± {half:.3f}" if len(losses) > 1 else f"{mean:.3f}"


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("orders")
    for name in ("learngene", "windows", "out"):
        one.add_argument(name)
    two = commands.add_parser("collect")
    two.add_argument("work", type=Path)
    two.add_argument("--text", default="library", help="what was trained on, for the rows")
    two.add_argument("--rows", default="", help="append to results/NAME.csv too")
    two.add_argument("--seconds", type=int, default=0, help="what the study took until here")
    options = parser.parse_args(words)
    if options.command == "orders":
        orders(options.learngene, options.windows, options.out)
    else:
        collect(options.work, options.text, options.rows, options.seconds)


if __name__ == "__main__":
    main()
