"""The model card of a student: where each part came from, under which licence, and how to make it again."""

from __future__ import annotations

from megatron_inherit.arch.counts import count_parameters
from megatron_inherit.base.quantities import format_count
from megatron_inherit.checkpoint.dtypes import TORCH_NAMES
from megatron_inherit.plan.ops import Init
from megatron_inherit.plan.plan import TransferPlan, describe_layers

_INFERENCE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


def model_card(plan: TransferPlan, *, command: str = "", note: str = "") -> str:
    """Writes the README.md of a model folder.

    Args:
        plan: What made it.
        command: The command line, for the reader who wants to repeat it.
        note: What is to be known of the teacher (``Instruct, dequantised from Q4_1``).
    """
    config, origin = plan.config, plan.origin
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {origin.licence}"] if origin and origin.licence else []
    head += ["tags:", "- inheritune" if plan.stages is None else "- sws", "---", ""]
    lines = [*head, f"# {config.num_layers}-layer {config.family} model", ""]
    lines += [plan.title[0].upper() + plan.title[1:] + ".", ""]
    lines += [f"The weights it was made from: {note}.", ""] if note else []
    lines += [
        "| | |",
        "|---|---|",
        f"| parameters | {format_count(count_parameters(config))} ({count_parameters(config):,}) |",
        f"| blocks | {config.num_layers}" + (f" of {origin.config.num_layers} |" if origin else " |"),
        f"| width, heads, key/value heads | {config.hidden_size}, {config.num_heads}, {config.num_kv_heads} |",
        f"| vocabulary | {config.vocab_size:,} |",
        f"| dtype | {', '.join(sorted({TORCH_NAMES[op.dtype] for op in plan.ops}))} |",
    ]
    if plan.stages is not None:
        lines.append(f"| learngene's stage for each block | {','.join(map(str, plan.stages))} |")
    elif origin and plan.layer_map is not None:
        lines.append(f"| teacher's block for each block | {describe_layers(plan.layer_map)} |")
    fresh = sorted({_short(op.target) for op in plan.ops if isinstance(op, Init)})
    lines.append(f"| drawn anew (seed {plan.seed}) | {', '.join(fresh)} |" if fresh else "| drawn anew | nothing |")
    lines += ["", "The weights were not trained after this step.", "", _INFERENCE]
    lines += ["Made with:", "", f"    {command}", ""] if command else []
    lines.append("`inherit.json` holds the source of every tensor, `manifest.json` the hash of every tensor.")
    if origin:
        named = (
            f"teacher's licence ({origin.licence})"
            if origin.licence
            else "licence of the teacher, whose folder names none,"
        )
        lines.append(f"The {named} holds for this model too.")
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    """Writes a tensor's name without its layer: ``attn.q``."""
    parts = name.rpartition(":")[2].split(".")
    return ".".join(parts[2:-1] if parts[0] == "layers" else parts[:-1])
