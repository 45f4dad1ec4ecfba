"""Two nodes on one machine: network namespaces with names of their own, or the loopback where that is not allowed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A place where commands run.

    Attributes:
        name: Its hostname, known to the other one.
        prefix: Words before a command that is to run there.
    """

    name: str
    prefix: tuple[str, ...] = ()


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Gives two nodes that reach each other by name."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        yield Node("127.0.0.1"), Node("127.0.0.1")
        return
    tag = os.getpid()
    names = [f"mi{tag}{letter}" for letter in "ab"]
    try:
        for index, name in enumerate(names):
            _ip("netns", "add", name)
            etc = Path("/etc/netns", name)
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {n}\n" for i, n in enumerate(names))
            )
            if index:
                _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for index, name in enumerate(names):
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", name)
            for device in ("lo", name):
                _ip("-n", name, "link", "set", device, "up")
        yield tuple(Node(name, _inside(name)) for name in names)  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def _inside(name: str) -> tuple[str, ...]:
    renamed = ("sh", "-c", 'hostname "$0" && exec "$@"', name)
    return ("ip", "netns", "exec", name, "unshare", "--uts", *renamed)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
