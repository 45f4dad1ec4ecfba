"""The command lines that start one training run on one machine or on several."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_inherit.base.errors import UsageError


def train_words(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Gives the words after ``python -m`` that train a recipe."""
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"{override!r} is not an override.", expected="key.path=value")
    return ["megatron_inherit", "train", recipe, *overrides]


def torchrun_words(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    gpus_per_node: int = 1,
    nodes: int = 1,
    rendezvous: str | None = None,
) -> list[str]:
    """Gives a torchrun command, one agent a node; the same words are run on every node.

    Args:
        recipe: Recipe name or path.
        overrides: ``key.path=value`` words.
        gpus_per_node: Processes a node.
        nodes: Number of nodes.
        rendezvous: ``host:port`` of the first node; needed for more than one node.
    """
    words = ["torchrun", f"--nproc-per-node={gpus_per_node}"]
    if nodes == 1:
        words.append("--standalone")
    elif rendezvous is None:
        raise UsageError("Several nodes need a meeting point.", fix="Pass --rendezvous HOST:PORT of the first node.")
    else:
        words += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-id=minherit"]
    return [*words, "-m", *train_words(recipe, overrides)]


def deepspeed_words(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    gpus_per_node: int = 1,
    hostfile: str | None = None,
) -> list[str]:
    """Gives a command of DeepSpeed's launcher, which reaches other nodes by ssh.

    Args:
        recipe: Recipe name or path.
        overrides: ``key.path=value`` words.
        gpus_per_node: Processes a node.
        hostfile: File of ``host slots=N`` lines; None runs on this machine.
    """
    where = ["--hostfile", hostfile] if hostfile else []
    return [
        "deepspeed",
        *where,
        f"--num_gpus={gpus_per_node}",
        "--no_local_rank",
        "--module",
        *train_words(recipe, overrides),
    ]
