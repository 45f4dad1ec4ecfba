"""What all ranks must have in common, compared before the first step: each opens its own files, on its own node."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from megatron_inherit import __version__
from megatron_inherit.base.errors import ConfigError, DataError
from megatron_inherit.config.load import config_hash

if TYPE_CHECKING:
    from megatron_inherit.train.session import Session

MOST_TOLD = 8
"""Of many ranks that differ only the first are named."""


def refuse_unlike_ranks(run: Session) -> None:
    """Compares recipe, program, data and samples given up with those of rank 0; all ranks call this together.

    Raises:
        DataError: On all ranks: some read other data than rank 0, in another order or from another tokenizer.
        ConfigError: On all ranks: some run another recipe or program.
    """
    told = [
        json.loads(text) for text in run.engine.gather_text(json.dumps({"host": socket.gethostname(), **_facts(run)}))
    ]
    for name in told[0]:
        unlike = [rank for rank, facts in enumerate(told) if name != "host" and facts[name] != told[0][name]]
        if unlike:
            _refuse(name, [f"rank {rank} on {told[rank]['host']}" for rank in unlike], told[0]["host"])


def _facts(run: Session) -> dict[str, str]:
    """Gives what is compared, each by its name in a sentence; a node may keep the data at a path of its own."""
    config, identity = run.plan.config, run.identity
    anywhere = config.model_copy(update={"data": config.data.model_copy(update={"path": "-"})})
    return {
        "program": __version__,
        "data": identity.data,
        "tokenizer": identity.tokenizer,
        "sample order": identity.order,
        "evaluation windows": "" if run.windows is None else run.windows.fingerprint,
        "recipe": config_hash(anywhere),
        "samples given up": json.dumps(run.skipped),
    }


def _refuse(name: str, ranks: list[str], host: str) -> None:
    more = f" and {len(ranks) - MOST_TOLD} more" if len(ranks) > MOST_TOLD else ""
    what = f"Not all ranks have the same {name}."
    got = f"another one at {', '.join(ranks[:MOST_TOLD])}{more} than at rank 0 on {host}"
    if name in ("data", "tokenizer", "sample order", "evaluation windows"):
        key = "eval.windows" if name == "evaluation windows" else "data.path"
        fix = f"Let {key} name a place that all nodes see, or copy the same files to each of them."
        raise DataError(what, got=got, fix=fix)
    raise ConfigError(
        what, got=got, fix="Start all ranks with the same files and words, on a file system all nodes see."
    )
