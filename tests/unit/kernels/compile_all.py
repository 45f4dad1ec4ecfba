"""Compiles every kernel for a GPU that is not there, through the package's own launches, and reports what each needs.

``python tests/unit/kernels/compile_all.py 80 90 [--all]`` prints one JSON object a compiled variant.
A driver that only knows a
target takes the place of CUDA's, and launches stop after compilation, so that the variants (alignment, constants, tile
sizes) are those that training builds. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TOOLS = Path(nvidia.__file__).parent / "bin"
HIDDEN, FFN, VOCAB, HEADS, HEAD_DIM = 3200, 8640, 32000, 32, 100
UNORDERED = re.compile(r"ld\.global\.b16(?:(?!bar\.sync).)*st\.global\.v4", re.DOTALL)
"""A single bfloat16 is read, and no barrier stands before the vectors that are written behind it."""
compiled: list[tuple[str, object]] = []


def pretend(capability: int) -> None:
    """Makes Triton believe in a device of this compute capability that never runs anything."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            map_python_to_cpp_type=lambda name: name,
        )
    )


def compile_only() -> None:
    run = jit.JITFunction.run

    def stop_before_launch(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = stop_before_launch


def report(name: str, kernel, case: str, capability: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {
        "capability": capability,
        "kernel": name,
        "case": case,
        "warps": kernel.metadata.num_warps,
        "registers": int(found[1]),
        "shared": kernel.metadata.shared,
        "reads_what_is_written": bool(UNORDERED.search(kernel.asm["ptx"])),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)) + int(found[4]),
        "widest_access": max(
            (int(bits) for bits in re.findall(r"(?:LDG|STG)\.E[.\w]*?\.(128|64)\b", code)), default=32
        ),
    }


def norms(dtype: torch.dtype, width: int) -> None:
    from megatron_inherit.kernels.norm import kernel

    x, residual = (torch.zeros(64, width, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(width, dtype=dtype, requires_grad=True) for _ in range(2))
    for outputs in (
        (kernel.rms_norm(x, weight, 1e-5),),
        kernel.add_rms_norm(x, residual, weight, 1e-5),
        kernel.add_layer_norm(x, residual, weight, bias, 1e-5),
    ):
        torch.autograd.grad(outputs, (x, weight), [torch.ones_like(output) for output in outputs])


def activations(dtype: torch.dtype, width: int) -> None:
    from megatron_inherit.kernels.activation import kernel

    packed = torch.zeros(64, 2 * width, dtype=dtype, requires_grad=True)
    x = torch.zeros(64, width, dtype=dtype, requires_grad=True)
    bias = torch.zeros(width, dtype=dtype, requires_grad=True)
    for output in (kernel.swiglu(packed), kernel.gelu_tanh(x, bias)):
        output.backward(torch.ones_like(output))


def ropes(dtype: torch.dtype, head_dim: int, pad_to: int, groups: int) -> None:
    from megatron_inherit.kernels.rope import kernel

    qkv = torch.zeros(16, 2, (HEADS + 2 * groups) * head_dim, dtype=dtype, requires_grad=True)
    table = torch.zeros(16, head_dim // 2)
    sizes = {"num_heads": HEADS, "num_kv_heads": groups, "head_dim": head_dim, "pad_to": pad_to}
    outputs = kernel.rope_qkv(qkv, table, table, **sizes)
    torch.autograd.grad(outputs, qkv, [torch.ones_like(output) for output in outputs])


def heads(dtype: torch.dtype, vocab: int) -> None:
    from megatron_inherit.kernels import head, row
    from megatron_inherit.kernels.linear_cross_entropy import kernel as lce
    from megatron_inherit.kernels.linear_kl import kernel as kl
    from megatron_inherit.kernels.linear_kl.reference import KINDS

    columns = (vocab // row.PADDING + 1) * row.PADDING
    logits, teacher = (torch.zeros(16, columns, dtype=dtype) for _ in range(2))
    labels, scale = torch.zeros(16, dtype=torch.int64), torch.ones(16)
    alone = head.Shard(0, vocab, vocab, None)
    sharded = SimpleNamespace(valid=vocab, group=object(), gather=lambda statistics: statistics[None])
    for shard in (alone, sharded):
        lce.rows(logits, labels, scale, shard=shard, z_loss=1e-4)
    for kind, shard in [(kind, alone) for kind in KINDS] + [("jsd", sharded)]:
        kl.rows(logits, teacher, labels, scale, shard=shard, kind=kind, temperature=2.0, alpha=0.5)
    ids = torch.arange(8).repeat(16, 1)
    kl.topk_rows(logits, ids, torch.zeros(16, 8), torch.zeros(16), scale, shard=alone, temperature=2.0)


def main() -> None:
    compile_only()
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = {
        f"width {HIDDEN} bf16": lambda: norms(bf16, HIDDEN),
        "width 8192 bf16": lambda: norms(bf16, 8192),
        "width 16384 bf16": lambda: norms(bf16, 16384),
        "width 128 bf16": lambda: norms(bf16, 128),
        f"ffn {FFN} bf16": lambda: activations(bf16, FFN),
        f"heads of {HEAD_DIM} padded to 128 bf16": lambda: ropes(bf16, HEAD_DIM, 128, HEADS),
        "heads of 128 in 8 groups bf16": lambda: ropes(bf16, 128, 128, 8),
        f"vocabulary {VOCAB} bf16": lambda: heads(bf16, VOCAB),
    }
    if "--all" in sys.argv:
        cases |= {
            f"width {HIDDEN} fp32": lambda: norms(fp32, HIDDEN),
            "width 16384 fp32": lambda: norms(fp32, 16384),
            f"ffn {FFN} fp32": lambda: activations(fp32, FFN),
            "heads of 128 in 8 groups fp32": lambda: ropes(fp32, 128, 128, 8),
            f"vocabulary {VOCAB} fp32": lambda: heads(fp32, VOCAB),
            "vocabulary 128256 bf16": lambda: heads(bf16, 128256),
        }
    for capability in (int(argument) for argument in sys.argv[1:] if argument.isdigit()):
        pretend(capability)
        for name, case in cases.items():
            compiled.clear()
            case()
            for kernel in dict.fromkeys(compiled):
                print(json.dumps(report(*kernel, name, capability)), flush=True)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET"
    main()
