"""What the benchmarks of this folder share: rows with their circumstances, and a child process that watches itself."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def circumstances(*packages: str) -> dict[str, Any]:
    """Gives date, processor, cores, memory, file system, load and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "versions": " ".join(f"{name}=={_version(name)}" for name in ("megatron-inherit", *packages)),
    }


def append_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Appends rows to ``results/NAME.csv``; new columns rewrite the file's head."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    old = list(csv.DictReader(path.open())) if path.exists() else []
    fields = list(dict.fromkeys(key for row in (*old, *rows) for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows([*old, *rows])
    return path


def run_child(words: Sequence[str]) -> dict[str, Any]:
    """Runs a ``minherit`` command in a process of its own.

    Returns:
        ``whole_s`` from fork to exit; ``seconds`` from parsed arguments to the end, imports left out; ``anon_mib`` the
        peak of RssAnon less its value after imports; ``rss_mib`` ru_maxrss; with ``--json`` also what the command says.
    """
    began = time.perf_counter()
    command = [sys.executable, __file__, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    output, errors = process.communicate()
    whole = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{errors}")
    said, _, own = output.rstrip("\n").rpartition("\n")
    return {**(json.loads(said) if "--json" in words else {}), "whole_s": whole, **json.loads(own)}


def warm(paths: Sequence[Path]) -> None:
    """Reads files so that they are in the page cache."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def copy_and_sync(source: Path, target: Path) -> float:
    """Copies a folder as ``cp --reflink=never`` and makes it durable; gives the seconds."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - began


def settle() -> None:
    """Writes back what is dirty, so that one measurement does not pay for another."""
    subprocess.run(["sync"], check=True)
    time.sleep(0.5)


def _child(words: Sequence[str]) -> None:
    import resource

    import megatron_inherit.checkpoint.formats.hf
    import megatron_inherit.cli.convert
    import megatron_inherit.cli.inherit
    import megatron_inherit.cli.transfer
    import megatron_inherit.inherit.inheritune  # noqa: F401
    from megatron_inherit.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()):
        main([words[0], "--help"])
    base, peak, stop = _anon(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _anon())
            stop.wait(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    code = main([*words])
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    if code:
        sys.exit(code)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "anon_mib": (peak[0] - base) / 1024, "rss_mib": rss}))


def _anon() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    _child(sys.argv[1:])
