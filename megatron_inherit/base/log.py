"""Program messages: standard logging, through rich on a terminal, plain lines elsewhere, rank 0 only unless asked."""

from __future__ import annotations

import logging
import os
import sys

ROOT = "megatron_inherit"


def get_logger(name: str) -> logging.Logger:
    """Gives the logger of a module; call it with ``__name__``."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


def set_up(*, verbose: bool = False, rank: int | None = None) -> None:
    """Sends messages to standard error; called once by the command line, never at import.

    Args:
        verbose: Shows debug messages.
        rank: This process's global rank; ranks other than 0 show warnings only. Default: ``RANK`` of the environment.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    logger = logging.getLogger(ROOT)
    logger.handlers.clear()
    logger.addHandler(_handler(rank))
    logger.propagate = False
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))


def _handler(rank: int) -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler = logging.StreamHandler()
    mark = f" [rank {rank}]" if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{mark} %(message)s", datefmt="%H:%M:%S"))
    return handler
