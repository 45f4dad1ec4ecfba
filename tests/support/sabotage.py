"""Engines that misbehave as hardware and data do; for ranks of ``tests.support.forked_world``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_inherit.engines import create


def sabotage(change: Callable[[Any, int, Any], None]) -> Callable[[], None]:
    """Gives what makes the engine of a rank misbehave: ``change(engine, rank)`` is called before every step."""

    def before():
        make = create.create_engine

        def create_engine(*words, **more):
            engine = make(*words, **more)
            step = engine.train_step

            def train_step(micro_batches, *, lr):
                change(engine, int(os.environ["RANK"]), micro_batches)
                return step(micro_batches, lr=lr)

            engine.train_step = train_step
            return engine

        create.create_engine = create_engine

    return before


def poison(wanted: Callable[[int], bool]) -> Callable[[Any, int, Any], None]:
    """Plants NaN into a gradient of rank 1 whenever ``wanted(first sample id)`` holds."""
    state = {"on": False, "hooked": False}

    def change(engine, rank, micro_batches):
        if rank != 1:
            return
        if not state["hooked"]:
            state["hooked"] = True
            model = engine.chunks[0] if hasattr(engine, "chunks") else engine.model
            parameter = next(model.parameters())
            parameter.register_hook(lambda gradient: gradient * float("nan") if state["on"] else gradient)
        state["on"] = wanted(int(micro_batches[0].sample_ids[0]))

    return change
