"""What a run reads beside its model: samples, evaluation windows, tokenizer files, and what identifies them."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_inherit.base.errors import DataError
from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.files import file_pool
from megatron_inherit.checkpoint.stream import SideFile
from megatron_inherit.data.loader import Loader, LoaderOptions, open_loader
from megatron_inherit.data.windows import EvalWindows
from megatron_inherit.train.preflight import RunPlan
from megatron_inherit.train.resume import Identity
from megatron_inherit.train.tokenizers import warn_of_other_tokenizers

logger = get_logger(__name__)


def open_data(plan: RunPlan, rank: int) -> tuple[Loader, EvalWindows | None]:
    """Opens the samples and the evaluation windows of a run.

    Args:
        plan: The resolved recipe.
        rank: Rank 0 verifies the files for all.

    Raises:
        DataError: Something is missing, damaged, too short or beyond the model's vocabulary or positions.
    """
    loader = open_run_loader(plan, rank)
    loader.require(plan.total_samples)
    loader.num_samples = sys.maxsize  # samples that rollbacks give up are made up for from one pass more
    path = plan.config.eval.windows
    windows = None if path is None else EvalWindows.load(path)
    if windows is not None:
        _check_windows(windows, plan)
    return loader, windows


def open_run_loader(plan: RunPlan, rank: int) -> Loader:
    """Opens the samples of a run; rank 0 verifies the files.

    A budget of all tokens of the data (50B of a subset of 50B) is no whole number of steps, and each pass ends with
    less than a sequence: the samples that the last step lacks come from one pass more.

    Raises:
        DataError: They are missing or damaged.
    """
    data, train = plan.config.data, plan.config.train
    loader = open_loader(
        LoaderOptions(
            path=data.path,
            sequence_length=train.sequence_length,
            seed=plan.config.run.seed if data.seed is None else data.seed,
            epochs=data.epochs,
            boundary=data.boundary,
            split=data.split,
            shuffle=data.shuffle,
            vocab_size=plan.model.vocab_size,
            verify=data.verify if rank == 0 else "none",
        )
    )
    if rank == 0:
        warn_of_other_tokenizers(plan, loader.stream.tokenizer)
    rest = plan.total_samples - loader.num_samples
    if train.budget is not None and 0 < rest <= plan.batches.full + data.epochs:
        loader.num_samples = plan.total_samples
        logger.info("The last step of train.budget reads %d samples again.", rest)
    return loader


def _check_windows(windows: EvalWindows, plan: RunPlan) -> None:
    length, largest = windows.tokens.shape[1] - 1, int(windows.tokens.max())
    if largest >= plan.model.vocab_size:
        raise DataError(
            f"{plan.config.eval.windows} holds token ids beyond the model's vocabulary.",
            got=largest,
            expected=f"below {plan.model.vocab_size}",
        )
    if length > plan.model.max_positions:
        raise DataError(
            f"The windows of {plan.config.eval.windows} are longer than the model's positions.",
            got=length,
            expected=f"at most {plan.model.max_positions}",
        )


def identity_of(plan: RunPlan, loader: Loader) -> Identity:
    """Gives what a checkpoint must share with this run."""
    tokenizer = loader.stream.tokenizer
    return Identity(
        model=plan.model.to_json(),
        tokenizer="" if tokenizer is None else tokenizer.fingerprint,
        data=loader.stream.fingerprint,
        order=loader.fingerprint,
        stages=plan.options.sharing.plan.to_json() if plan.options.sharing else None,
    )


def _find_side_files(plan: RunPlan, loader: Loader) -> tuple[SideFile, ...]:
    """Takes the model's tokenizer and licence; a preset's model takes the tokenizer of its data."""
    if plan.source is not None and plan.source.side_files:
        return plan.source.side_files
    tokenizer = loader.stream.tokenizer
    if tokenizer is not None and tokenizer.kind == "bytes":
        from megatron_inherit.data.byte_files import byte_tokenizer_files

        return tuple(SideFile(name, content=content) for name, content in byte_tokenizer_files().items())
    path = Path(tokenizer.path) if tokenizer is not None else None
    if path is None or not path.exists():
        return ()
    from megatron_inherit.checkpoint.formats.hf import side_files

    if path.is_file():
        return (SideFile(path.name, str(path)),)
    with file_pool() as pool:
        return side_files(pool, str(path))


def read_side_files(plan: RunPlan, loader: Loader) -> tuple[SideFile, ...]:
    """Reads what travels with the weights into every checkpoint, once: its folder may go while the run lasts."""
    with file_pool() as pool:
        return tuple(SideFile(file.name, content=file.read(pool)) for file in _find_side_files(plan, loader))
