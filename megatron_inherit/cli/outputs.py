"""What ``inherit`` and ``convert`` refuse about their output before anything is read."""

from __future__ import annotations

from megatron_inherit.base.errors import UsageError

WRITTEN = ("hf", "meta", "megatron", "torch_dist", "ds_universal")
"""The formats of models that can be asked for."""
_CUT = {"hf": (), "ds_universal": (), "meta": ("tp",)}
"""Format -> the parallel sizes it is cut by; the others know all of them."""


def refuse_ignored(format: str, *, tp: int = 1, pp: int = 1, vpp: int = 1, optimizer: str = "drop") -> bool:
    """Refuses sizes that a format is not cut by, so that nothing asked for is left out in silence.

    Args:
        format: Name of the output's format.
        tp: Tensor-parallel size asked for.
        pp: Pipeline-parallel size.
        vpp: Virtual chunks a pipeline rank.
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
    for name, size in (("tp", tp), ("pp", pp), ("vpp", vpp)):
        if size > 1 and name not in _CUT.get(format, (name,)):
            raise UsageError(
                f"--{name} {size} means nothing to the format {format}, whose files are not cut that way.",
                fix=f"Leave --{name} out, or choose --format megatron or torch_dist.",
            )
    return optimizer == "keep"
