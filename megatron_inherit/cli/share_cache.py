"""What ``minherit share cache`` does: a recipe's samples, its teacher, and the shards that are still missing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.distill.cache import Manifest, Method, cache_key
from megatron_inherit.distill.cache_writer import Share, write_cache

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.config.schema import RunConfig
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.distill.targets import Targets


def make_cache(
    config: RunConfig,
    folder: Path,
    *,
    entries: int,
    method: Method,
    samples: int | None,
    shard_samples: int,
    share: Share,
    tell: Callable[[str], None],
) -> int:
    """Writes the targets of a recipe's teacher for its samples; an interrupted cache goes on.

    Args:
        config: The recipe, with ``distill.teacher``.
        folder: Output.
        entries: Stored tokens for each token.
        method: ``top`` or ``draw``.
        samples: How many; default all that the recipe trains on.
        shard_samples: Samples of a file.
        share: Which files are this process's.
        tell: Gets a line a shard.

    Returns:
        The number of samples in the cache.

    Raises:
        ConfigError: The recipe names no teacher, or more entries are asked for than there are tokens.
        DataError: The data has fewer samples, or the folder holds another cache.
        UsageError: Another process makes the same files.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_inherit.train.inputs import open_run_loader
    from megatron_inherit.train.objectives import teacher_of
    from megatron_inherit.train.preflight import plan_run

    alone = config.model_copy(update={"parallel": type(config.parallel)()})  # who trains with it does not matter
    plan = plan_run(alone, world_size=1)
    teacher = _require(teacher_of(alone, plan.model), entries)
    loader = open_run_loader(plan, 0)
    count = samples or plan.total_samples
    loader.require(count)
    wanted = Manifest(
        key=cache_key(teacher, loader, temperature=config.distill.temperature),
        method=method,
        entries=entries,
        num_samples=count,
        shard_samples=shard_samples,
        dtype=config.train.dtype,
        seed=config.run.seed if method == "draw" else 0,
    )
    predictor = functools.cache(lambda: _predictor(teacher, config, wanted))

    def predict(batch: Batch) -> Targets:
        return predictor()(batch)  # the model is built for the first missing shard: whoever joins shares needs none

    for done in write_cache(folder, wanted, loader.batch, predict, share):
        tell(f"{done} samples of share {share.index}/{share.of}" if share.of > 1 else f"{done} of {count} samples")
    return count


def _predictor(teacher: Source, config: RunConfig, wanted: Manifest) -> Callable[[Batch], Targets]:
    from megatron_inherit.distill.teacher import target_predictor
    from megatron_inherit.model.build import DTYPES

    return target_predictor(
        teacher,
        method=wanted.method,
        entries=wanted.entries,
        temperature=config.distill.temperature,
        micro_batch=config.train.micro_batch,
        dtype=DTYPES[config.train.dtype],
        seed=config.run.seed,
    )


def share_of(text: str) -> Share:
    """Reads ``INDEX/COUNT``, the index from 0.

    Raises:
        UsageError: It is something else.
    """
    index, slash, of = text.partition("/")
    if slash and index.isdecimal() and of.isdecimal() and int(index) < int(of):
        return Share(int(index), int(of))
    raise UsageError(f"--share {text} is not understood.", expected="INDEX/COUNT, the index from 0: 0/8 to 7/8")


def _require(teacher: Source | None, entries: int) -> Source:
    if teacher is None:
        raise ConfigError("The recipe names no teacher.", fix="Set distill.teacher.")
    most = teacher.config.vocab_size
    if entries > most:
        raise ConfigError("--entries: more than the teacher has tokens.", got=entries, expected=f"at most {most}")
    return teacher
