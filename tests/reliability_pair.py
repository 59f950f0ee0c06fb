"""A pair whose merge takes a second or two: enough to interrupt it in its middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from commands import recipe


def write_slow_pair(folder: Path) -> dict[str, Any]:
    """Write base and fine-tuned checkpoint into a folder; return the recipe."""
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(2e-3 * torch.randn(parameter.shape))
        model.save_pretrained(folder / "tuned")
    return recipe(folder / "base", folder / "tuned")
