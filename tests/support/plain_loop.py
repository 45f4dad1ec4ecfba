"""The plain training loop that both engines must equal: transformers, torch.optim.AdamW, one process.

``python -m tests.support.plain_loop`` writes the golden losses anew; do so only when the loop itself was wrong.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.plan.init import draw
from tests.support.checkpoints import write_checkpoint
from tests.support.engine_world import MODELS, global_batch, learning_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
STEPS, SEED = 20, 3
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


def fresh_folder(folder: Path, config: ModelConfig, seed: int = SEED) -> Path:
    """Writes a Hugging Face folder with the project's fresh values."""
    arrays = {
        spec.name: draw(spec, num_layers=config.num_layers, seed=seed).reshape(spec.shape)
        for spec in enumerate_tensors(config)
    }
    return write_checkpoint(folder, config, arrays, "hf")


def plain_loop(config: ModelConfig, folder: Path, steps: int = STEPS) -> list[tuple[float, float]]:
    """Trains on the batches of ``engine_world`` and gives (loss, gradient norm) of each step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)
    history = []
    for step in range(steps):
        batch = global_batch(step)
        logits = model(torch.from_numpy(batch.tokens), use_cache=False).logits
        labels = torch.from_numpy(np.where(batch.loss_mask, batch.labels, -100))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history


def golden(name: str) -> list[tuple[float, float]]:
    """Reads the golden (loss, gradient norm) of each step of a model of ``engine_world``."""
    rows = json.loads((GOLDEN / f"{name}.json").read_text())
    return list(zip(rows["loss"], rows["grad_norm"], strict=True))


def write_golden() -> None:
    """Runs the loop for both models and writes their files."""
    torch.set_num_threads(1)
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            history = plain_loop(config, fresh_folder(Path(folder) / name, config))
        rows = {"loss": [loss for loss, _ in history], "grad_norm": [norm for _, norm in history]}
        (GOLDEN / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
