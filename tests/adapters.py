"""LoRA adapters of every linear kind, made by peft on small real models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 32,
}
MOE_SIZES = TEXT_SIZES | {"num_experts_per_tok": 2, "num_hidden_layers": 2}


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 12)
        self.wave = nn.Conv1d(12, 16, 3)
        self.image = nn.Conv2d(3, 20, 5)
        self.point = nn.Conv2d(20, 14, 1)
        self.volume = nn.Conv3d(2, 9, 2)
        self.head = nn.Linear(20, 10)


def _llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT_SIZES | {"attention_bias": True} | changes)
    )


def _qwen2() -> nn.Module:
    sizes = {k: v for k, v in TEXT_SIZES.items() if k != "head_dim"}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    )


def _qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**MOE_SIZES, num_experts=4, moe_intermediate_size=24)
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE_SIZES, num_local_experts=4))


@dataclass(frozen=True)
class Kind:
    """One way of using LoRA: the model, and what LoraConfig is told."""

    build: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


_ATTENTION = ["q_proj", "v_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "plain": Kind(_llama, {"target_modules": [*_ATTENTION, "down_proj"]}),
    "all-linear": Kind(_llama, {"target_modules": "all-linear"}),
    "rslora": Kind(_llama, {"target_modules": _ATTENTION, "use_rslora": True}),
    "rank-pattern": Kind(
        _llama,
        {
            "target_modules": [*_ATTENTION, "up_proj"],
            "rank_pattern": {r"layers\.1\..*q_proj": 3, "v_proj": 7},
        },
    ),
    "alpha-pattern": Kind(
        _llama,
        {"target_modules": _ATTENTION, "alpha_pattern": {"q_proj": 5}, "rank_pattern": {"q_proj": 2}},
    ),
    "layers": Kind(_llama, {"target_modules": _ATTENTION, "layers_to_transform": [0, 2]}),
    "lora-bias": Kind(_qwen2, {"target_modules": _ATTENTION, "lora_bias": True}),
    "embeddings": Kind(_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "conv1d-gpt2": Kind(_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": Kind(ConvNet, {"target_modules": ["tokens", "wave", "image", "point", "volume", "head"]}),
    "experts-qwen3": Kind(_qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "experts-mixtral": Kind(_mixtral, {"target_modules": [], "target_parameters": _EXPERTS}),
    "experts-patterns": Kind(
        _qwen3_moe,
        {
            "target_modules": ["q_proj"],
            "target_parameters": _EXPERTS,
            "rank_pattern": {r".*\.experts\..*": 5},
            "alpha_pattern": {r".*\.experts\..*": 3},
        },
    ),
    "rank-above-size": Kind(_llama, {"target_modules": ["k_proj"], "r": 24}),
    "saved-modules": Kind(_llama, {"target_modules": _ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "trained-biases": Kind(_qwen2, {"target_modules": _ATTENTION, "bias": "all"}),
}


def fill(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Give every trainable tensor of an adapter values, the factors a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_" in name:
                parameter.copy_(scale * noise)
                if "lora_A" in name or "lora_embedding_A" in name:
                    decay = torch.logspace(0, -1.5, len(parameter))
                    parameter.mul_(decay.reshape(-1, *[1] * (parameter.ndim - 1)))
            else:
                parameter.add_(0.02 * noise)


def base_model(kind: str) -> nn.Module:
    """The base of a kind, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return KINDS[kind].build().float().eval()


def make_adapter(
    kind: str,
    folder: Path,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    base_dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """An adapter of a kind, trained by nobody, saved by peft."""
    options = {"r": 4, "lora_alpha": 6} | KINDS[kind].options | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base_model(kind).to(base_dtype).float(), peft.LoraConfig(**options))
        fill(adapted, seed, scale)
        if dtype != torch.float32:
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
        adapted.save_pretrained(folder)
    return folder


def load_adapter(kind: str, folder: Path, **options: Any) -> peft.PeftModel:
    """The base of a kind with an adapter on it, loaded by peft; a missing tensor is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(base_model(kind), folder, **options)
    return model


def updates(model: peft.PeftModel) -> dict[str, Tensor]:
    """dW of every adapted layer, as peft itself computes it."""
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
