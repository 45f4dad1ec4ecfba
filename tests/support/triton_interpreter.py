"""Makes Triton's interpreter trustworthy for bfloat16; imported before a kernel by tests under TRITON_INTERPRET=1.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as bit patterns in uint16. It truncates float32 to bfloat16 where
the hardware rounds to nearest even, and does arithmetic on the patterns themselves. The first is repaired here; the
second raises, since our kernels compute in float32 and must never get there. Python floats reach a kernel as they are
and not as float32, as the launcher passes them; that is repaired too.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_implicit = interpreter._implicit_cvt
_builder = interpreter.InterpreterBuilder


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _convert_float(values, source, target, mode):
    if source == tl.float32 and target == tl.bfloat16:
        return _round_to_bfloat16(values)
    if source == tl.bfloat16 and target == tl.float32:
        return np.asarray(values).astype(np.uint32) << 16
    return _convert(values, source, target, mode)


def _implicit_cvt(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return _implicit(value)


def _refuse_bfloat16(method):
    def guarded(self, *operands):
        for operand in operands:
            if getattr(operand, "dtype", None) is not None and operand.dtype.scalar == tl.bfloat16:
                raise TypeError("A kernel computes in bfloat16; the interpreter would do so on bit patterns.")
        return method(self, *operands)

    return guarded


interpreter._convert_float = _convert_float
interpreter._implicit_cvt = _implicit_cvt
for _name in ("binary_op", "unary_op", "create_dot"):
    setattr(_builder, _name, _refuse_bfloat16(getattr(_builder, _name)))
