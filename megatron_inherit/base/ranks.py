"""Which process of a job this is, from whatever launched it: torchrun, deepspeed, srun or nobody."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from megatron_inherit.base.errors import UsageError

_OF_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def adopt_launcher(environ: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK of an srun step that has one task a process; leaves other launchers alone.

    Args:
        environ: The process's environment; changed in place.

    Raises:
        UsageError: srun started several tasks and MASTER_ADDR is not set, so that they cannot find each other.
    """
    if "RANK" in environ or not _is_srun_step(environ):
        return
    for name, source in _OF_SLURM.items():
        environ[name] = environ[source]
    if int(environ["WORLD_SIZE"]) > 1 and "MASTER_ADDR" not in environ:
        raise UsageError(
            f"srun started {environ['WORLD_SIZE']} tasks, but MASTER_ADDR is not set.",
            fix="Export MASTER_ADDR and MASTER_PORT, or use the script that 'minherit launch slurm' prints.",
        )


def _is_srun_step(environ: Mapping[str, str]) -> bool:
    return all(name in environ for name in (*_OF_SLURM.values(), "SLURM_STEP_ID"))
