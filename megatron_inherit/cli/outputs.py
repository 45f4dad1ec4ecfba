"""What ``inherit`` and ``convert`` refuse about their output before anything is read."""

from __future__ import annotations

from megatron_inherit.base.errors import UsageError

WRITTEN = ("hf", "meta", "megatron", "torch_dist", "ds_universal")
"""The formats of models that can be asked for."""
_MEGATRON = ("tp", "pp", "vpp", "dialect", "vocab-multiple", "iteration")
_KNOWN = {
    "hf": ("max-shard-size",),
    "meta": ("tp", "dialect"),
    "megatron": _MEGATRON,
    "torch_dist": _MEGATRON,
    "ds_universal": ("dialect", "iteration"),
}
"""Format -> the options of its layout."""


def refuse_ignored(
    format: str,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    dialect: str = "",
    vocab_multiple: int = 128,
    iteration: int = 0,
    max_shard_size: str = "5GB",
    optimizer: str = "drop",
) -> bool:
    """Refuses options that a format's layout does not have, so that nothing asked for is left out in silence.

    Args:
        format: Name of the output's format.
        tp: Tensor-parallel size asked for.
        pp: Pipeline-parallel size.
        vpp: Virtual chunks a pipeline rank.
        dialect: Variant of the format.
        vocab_multiple: What the vocabulary is padded to.
        iteration: Number in the names of training formats.
        max_shard_size: Largest file of a Hugging Face folder.
        optimizer: ``keep`` takes the optimizer state along, ``drop`` does not.

    Returns:
        Whether the optimizer state is kept.

    Raises:
        UsageError: There is no such format to write, or it has no such thing.
    """
    if format not in WRITTEN:
        raise UsageError(f"--format {format} is none that can be written.", expected=", ".join(WRITTEN))
    if optimizer not in ("keep", "drop"):
        raise UsageError(f"--optimizer {optimizer} is not understood.", expected="keep or drop")
    asked = {
        "tp": (tp, 1),
        "pp": (pp, 1),
        "vpp": (vpp, 1),
        "dialect": (dialect, ""),
        "vocab-multiple": (vocab_multiple, 128),
        "iteration": (iteration, 0),
        "max-shard-size": (max_shard_size, "5GB"),
    }
    for name, (value, default) in asked.items():
        if value != default and name not in _KNOWN[format]:
            others = [other for other, known in _KNOWN.items() if name in known]
            raise UsageError(
                f"--{name} {value} means nothing to the format {format}, whose files are not cut or named that way.",
                fix=f"Leave --{name} out, or choose --format {' or '.join(others)}.",
            )
    return optimizer == "keep"
