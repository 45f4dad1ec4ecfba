"""Engines that misbehave as hardware and data do; for ranks of ``tests.support.forked_world``."""

from __future__ import annotations

import os
import time
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


def _model(engine: Any) -> Any:
    return engine.chunks[0] if hasattr(engine, "chunks") else engine.model


def dawdle(seconds: float) -> Callable[[Any, int, Any], None]:
    """Makes rank 1 sleep in every pass through its model."""
    hooked: list[int] = []

    def change(engine, rank, micro_batches):
        if rank == 1 and not hooked:
            hooked.append(rank)
            _model(engine).decoder.register_forward_pre_hook(lambda *_: time.sleep(seconds))

    return change


def spike(wanted: Callable[[int], bool], factor: float = 300.0) -> Callable[[Any, int, Any], None]:
    """Blows up the last hidden states in training whenever ``wanted(first sample id)``: the loss is high and finite."""
    state = {"on": False, "hooked": False}

    def change(engine, rank, micro_batches):
        if not state["hooked"]:
            state["hooked"] = True
            _model(engine).decoder.register_forward_hook(
                lambda module, inputs, output: output * factor if state["on"] and module.training else output
            )
        state["on"] = wanted(int(micro_batches[0].sample_ids[0]))

    return change


def poison(wanted: Callable[[int], bool]) -> Callable[[Any, int, Any], None]:
    """Plants NaN into a gradient of rank 1 whenever ``wanted(first sample id)`` holds."""
    state = {"on": False, "hooked": False}

    def change(engine, rank, micro_batches):
        if rank != 1:
            return
        if not state["hooked"]:
            state["hooked"] = True
            parameter = next(_model(engine).parameters())
            parameter.register_hook(lambda gradient: gradient * float("nan") if state["on"] else gradient)
        state["on"] = wanted(int(micro_batches[0].sample_ids[0]))

    return change
