"""Measures our kernels on this GPU beside torch eager, torch.compile, Liger and, where installed, QuACK, apex and TE.

    python benchmarks/kernels.py [--shapes 1.8b 7b 128k] [--operations rms_norm swiglu ...]
    python benchmarks/kernels.py --toy       # every operation and rival once, tiny, on any machine; writes no row

Inputs are random, new for every set, and rotated so that no call finds its own in the L2. Times are medians of CUDA
events. An element-wise operation's share is the time of a copy of as many bytes as it must move at least, over its own;
a head's is the time of its bare matrix products over its own. Peak memory counts what a call and its backward pass
allocate, gradients included. Errors are against float64, relative to the largest magnitude, over outputs and gradients
of 256 rows. Rows go to benchmarks/results/kernels_<device>.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "1.8b": {"rows": 16384, "hidden": 3200, "ffn": 8640, "vocab": 32000, "heads": 32, "groups": 32, "head": 100},
    "7b": {"rows": 16384, "hidden": 4096, "ffn": 11008, "vocab": 32000, "heads": 32, "groups": 32, "head": 128},
    "128k": {"rows": 8192, "hidden": 4096, "ffn": 14336, "vocab": 128256, "heads": 32, "groups": 8, "head": 128},
}
TOY = {"rows": 16, "hidden": 32, "ffn": 48, "vocab": 96, "heads": 2, "groups": 1, "head": 10}
REPEATS, WARM_UP, ERROR_ROWS = 30, 10, 256
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def main() -> int:
    arguments = parse()
    if arguments.toy:
        return run_toy(arguments.operations)
    if not CUDA:
        print("benchmarks/kernels.py needs one CUDA GPU with 40 GB of memory or more, torch with CUDA and triton.")
        print(
            "For the rivals: pip install liger-kernel==0.8.5 quack-kernels (Hopper); apex and TE come with NGC images."
        )
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict] = []
    lost = []
    for name in arguments.shapes:
        for operation in operations_of(SHAPES[name], pad=128, teacher=4096):
            if not arguments.operations or operation.name in arguments.operations:
                found = list(measure(operation))
                lost += [] if any(row["implementation"] == "ours" for row in found) else [operation.name]
                rows += found
                write(rows)
    if lost:
        print(f"Ours was not measured: {', '.join(lost)}.")
    return int(bool(lost))


def operations_of(size: dict[str, int], *, pad: int, teacher: int) -> list:
    """Gives every operation at the sizes of a model."""
    from kernel_operations import activation_operations, head_operations, norm_operations, rope_operations

    return [
        *norm_operations(size["rows"], size["hidden"]),
        *rope_operations(size["rows"], size["heads"], size["groups"], size["head"], pad),
        *activation_operations(size["rows"], size["ffn"]),
        *head_operations(size["rows"], size["hidden"], size["vocab"], teacher),
    ]


def run_toy(names: list[str]) -> int:
    """Goes the way of a measurement with tiny tensors; without a GPU Triton's interpreter runs the kernels."""
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["MINHERIT_KERNELS"] = "triton"
    wanted, found = [], []
    for operation in operations_of(TOY, pad=16, teacher=24):
        if names and operation.name not in names:
            continue
        if not CUDA:  # the interpreter lacks CUDA's mathematics, which Liger's norms call; QuACK is no Triton
            left_out = {"compile", "quack", *(["liger"] if "norm" in operation.name else [])}
            for name in left_out & operation.implementations.keys():
                del operation.implementations[name]
        wanted += [(operation.name, name) for name in operation.implementations]
        found += [(row["operation"], row["implementation"]) for row in measure(operation)]
    print("No row was written: this is no measurement.")
    return int(not set(wanted) <= set(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--operations", nargs="+", default=[], help="names; default: all")
    return parser.parse_args()


def measure(operation) -> Iterator[dict]:
    """Gives one row an implementation and direction of an operation, and prints it."""
    sets = rotated(operation)
    roof = matmul_seconds(operation, sets) if operation.flops else None
    for name, function in operation.implementations.items():
        try:
            found = {"error": f"{error(operation, function):.2e}", "peak_mib": f"{peak(function, sets[0]):.0f}"}
            for direction, seconds in times(operation, function, sets).items():
                row = facts() | {
                    "operation": operation.name, "shape": operation.shape, "implementation": name,
                    "version": version(name), "direction": direction, "median_ms": f"{seconds * 1e3:.4f}",
                }  # fmt: skip
                row |= rate(operation, direction, seconds, roof) | found
                print(" ".join(str(row[key]) for key in COLUMNS[3:]), flush=True)
                yield row
        except Exception as failure:
            print(f"{operation.name} {operation.shape} {name}: not measured: {type(failure).__name__}: {failure}")
        if CUDA:
            torch.cuda.empty_cache()


def draw_on(device: str, dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    """Gives a function that draws normal values of a shape."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def leaves(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.requires_grad_(not key.startswith("_")) for key, value in inputs.items()}


def rotated(operation) -> list[dict[str, torch.Tensor]]:
    """Draws sets of inputs that together exceed the L2 four times, two sets at least, eight at most."""
    first = leaves(operation.inputs(draw_on(DEVICE, DTYPE, 0), operation.rows))
    size = sum(value.nbytes for value in first.values())
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if CUDA else 0
    count = min(8, max(2, 4 * cache // size + 1))
    more = [leaves(operation.inputs(draw_on(DEVICE, DTYPE, s), operation.rows)) for s in range(1, count)]
    return [first, *more]


def outputs_of(function, inputs) -> tuple[torch.Tensor, ...]:
    found = function(inputs)
    return found if isinstance(found, tuple) else (found,)


def gradients(outputs, inputs, upstream) -> tuple[torch.Tensor, ...]:
    wanted = [value for value in inputs.values() if value.requires_grad]
    return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def median_seconds(calls: list[Callable[[], object]]) -> float:
    """Times calls in turn, each between two events on the device."""
    if not CUDA:
        return _host_seconds(calls[0])
    for index in range(WARM_UP):
        calls[index % len(calls)]()
    spans = []
    for index in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[index % len(calls)]()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3


def _host_seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def times(operation, function, sets) -> dict[str, float]:
    """Gives the medians: both directions together for a head, each alone otherwise."""
    if operation.flops:

        def step(inputs) -> None:
            outputs = outputs_of(function, inputs)
            gradients(outputs, inputs, [torch.ones_like(output) for output in outputs])

        return {"both": median_seconds([lambda inputs=inputs: step(inputs) for inputs in sets])}
    forward = median_seconds([lambda inputs=inputs: function(inputs) for inputs in sets])
    graphs = []
    for inputs in sets:
        outputs = outputs_of(function, inputs)
        graphs.append((outputs, inputs, [torch.randn_like(output) for output in outputs]))
    return {"forward": forward, "backward": median_seconds([lambda graph=graph: gradients(*graph) for graph in graphs])}


def copy_seconds(size: int) -> float:
    """Times copies that move ``size`` bytes, half read and half written, rotated like the inputs."""
    pairs = [torch.empty(2, size // 2, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
    return median_seconds([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])


def matmul_seconds(operation, sets) -> float:
    """Times the bare matrix products of a head: logits, both gradients and, for two heads, the teacher's logits."""

    def products(t) -> None:
        logits = t["hidden"].detach() @ t["weight"].detach().t()
        if "_teacher_hidden" in t:
            t["_teacher_hidden"] @ t["_teacher_weight"].t()
        logits @ t["weight"].detach()
        logits.t() @ t["hidden"].detach()

    return median_seconds([lambda inputs=inputs: products(inputs) for inputs in sets])


def rate(operation, direction: str, seconds: float, roof: float | None) -> dict[str, str]:
    if roof is not None:
        return {"rate": f"{operation.flops / seconds / 1e12:.1f} TFLOP/s", "share_of_roof": f"{roof / seconds:.3f}"}
    size = operation.forward_bytes if direction == "forward" else operation.backward_bytes
    return {"rate": f"{size / seconds / 1e9:.0f} GB/s", "share_of_roof": f"{copy_seconds(size) / seconds:.3f}"}


def peak(function, inputs) -> float:
    """Gives MiB allocated at most by a call and its backward pass, beyond what was there."""
    gradients(found := outputs_of(function, inputs), inputs, [torch.ones_like(output) for output in found])
    del found
    if not CUDA:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = outputs_of(function, inputs)
    gradients(outputs, inputs, [torch.ones_like(output) for output in outputs])
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def error(operation, function) -> float:
    """Gives the largest error against the eager operation in float64, over outputs and gradients."""
    inputs = operation.inputs(draw_on(DEVICE, DTYPE, 99), min(ERROR_ROWS, operation.rows))
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    results = []
    for chosen, tensors in ((function, leaves(inputs)), (operation.implementations["eager"], leaves(wide))):
        outputs = outputs_of(chosen, tensors)
        upstream = [torch.ones_like(output) for output in outputs]
        results.append([value.detach() for value in (*outputs, *gradients(outputs, tensors, upstream))])
    return max(
        float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-12))
        for got, want in zip(*results, strict=True)
    )


def version(implementation: str) -> str:
    from kernel_operations import installed

    packages = {"liger": "liger-kernel", "quack": "quack-kernels", "transformer_engine": "transformer-engine"}
    return installed(packages.get(implementation, "apex" if implementation == "apex" else "torch"))


def facts() -> dict[str, str]:
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}",
    }


COLUMNS = [
    "date", "device", "versions", "operation", "shape", "implementation", "version", "direction", "median_ms", "rate",
    "share_of_roof", "peak_mib", "error",
]  # fmt: skip


def write(rows: list[dict]) -> None:
    device = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"kernels_{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
