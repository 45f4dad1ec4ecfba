"""Fresh initial values that depend on nothing but (seed, tensor name, element index): the same bits in any layout.

Element e of a tensor comes from block e // BLOCK of a Philox counter stream keyed by seed and name, so that a slice is
drawn without the rest, by any number of threads or ranks.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from megatron_inherit.arch.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy

BLOCK = 1 << 16
STD = 0.02


def init_std(spec: TensorSpec, num_layers: int, std: float = STD) -> float:
    """Gives the standard deviation of a normally initialised tensor; residual projections get std / sqrt(2 n)."""
    return std / math.sqrt(2 * num_layers) if spec.init == "residual" else std


def draw(
    spec: TensorSpec, *, num_layers: int, seed: int, start: int = 0, stop: int | None = None, std: float = STD
) -> numpy.ndarray:
    """Draws elements ``[start, stop)``, in row-major order, of a tensor's initial values.

    Args:
        spec: The tensor; its ``init`` says which values.
        num_layers: Depth of the model that is initialised.
        seed: The run's seed.
        start: First element.
        stop: One past the last element; default all.
        std: Standard deviation before the residual scaling.

    Returns:
        float32 array of ``stop - start`` elements.
    """
    import numpy as np

    stop = spec.numel if stop is None else stop
    if spec.init in ("ones", "zeros"):
        return np.full(stop - start, 1.0 if spec.init == "ones" else 0.0, dtype=np.float32)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=16).digest(), "little")
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        values = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block])).standard_normal(
            min(BLOCK, spec.numel - block * BLOCK), dtype=np.float32
        )
        low, high = max(start, block * BLOCK), min(stop, block * BLOCK + len(values))
        out[low - start : high - start] = values[low - block * BLOCK : high - block * BLOCK]
    out *= np.float32(init_std(spec, num_layers, std))
    return out
