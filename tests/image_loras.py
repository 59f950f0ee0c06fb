"""LoRA files of image models, written and read by diffusers on tiny models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "proj_in"]


def unet(**changes: Any) -> nn.Module:
    """A UNet of SD 1.5's kind."""
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=8,
        **changes,
    )


def text_encoder() -> nn.Module:
    """CLIP's text side."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
        )
    )


def flux() -> nn.Module:
    """A transformer of Flux' kind: hidden size 32."""
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def sd3() -> nn.Module:
    """A transformer of SD3's kind."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )


def qwen_image() -> nn.Module:
    """A transformer of Qwen-Image's kind."""
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


# Name: pipeline, its denoiser and that one's name.
MODELS: dict[str, tuple[Any, Any, str]] = {
    "sd15": (StableDiffusionPipeline, unet, "unet"),
    "sdxl": (StableDiffusionXLPipeline, unet, "unet"),
    "flux": (FluxPipeline, flux, "transformer"),
    "sd3": (StableDiffusion3Pipeline, sd3, "transformer"),
    "qwen-image": (QwenImagePipeline, qwen_image, "transformer"),
}


def trained(model: nn.Module, targets: list[str], rank: int = 6, alpha: int = 6, seed: int = 0) -> LoraConfig:
    """Put an adapter on a model, with a spectrum that falls, and return its configuration."""
    # A rank of its own where two modules are named alike, and one in all.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                weight = factor.weight.data
                weight.copy_(torch.randn(weight.shape, generator=generator))
            weight *= (0.6 ** torch.arange(weight.shape[1])).view(1, -1, *[1] * (weight.ndim - 2))
    return config


def write(
    name: str, folder: Path, *, old: bool = False, settings: bool = False, seed: int = 0, **lora: Any
) -> Path:
    """Return the file that the pipeline's own `save_lora_weights` writes.

    Args:
        name: of `MODELS`.
        folder: where to.
        old: by the names that diffusers used before peft's, as its training scripts write them.
        settings: with the settings of the adapter in the header.
        seed: of the factors.
        lora: rank and alpha.
    """
    pipeline, make, part = MODELS[name]
    torch.manual_seed(0)
    model = make()
    targets = ATTENTION + CONVOLUTIONS if part == "unet" else ATTENTION
    config = trained(model, targets, seed=seed, **lora)
    convert = convert_state_dict_to_diffusers if old else dict
    parts = {f"{part}_lora_layers": convert(get_peft_model_state_dict(model))}
    described = {part: config} if settings else {}
    for encoder in {"sd15": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}.get(name, []):
        text = text_encoder()
        described |= {encoder: trained(text, ["q_proj", "out_proj"], seed=seed + 1)} if settings else {}
        if not settings:
            trained(text, ["q_proj", "out_proj"], seed=seed + 1)
        parts[f"{encoder}_lora_layers"] = convert(get_peft_model_state_dict(text))
    if settings:
        parts |= _collate_lora_metadata({part: model})
    pipeline.save_lora_weights(folder, **parts)
    return folder / "pytorch_lora_weights.safetensors"


def write_kohya(folder: Path, alpha: float = 3.0, seed: int = 0) -> Path:
    """Return a file of kohya's names for SD 1.5, by diffusers' own converter, with an alpha that counts."""
    source = load_file(write("sd15", folder, seed=seed))
    tensors = convert_state_dict_to_kohya(source)
    tensors = {k: torch.tensor(alpha) if k.endswith(".alpha") else t for k, t in tensors.items()}
    # sd-scripts spells the one text encoder of SD 1.5 without a number.
    tensors = {k.replace("lora_te1_", "lora_te_"): t.contiguous() for k, t in tensors.items()}
    path = folder / "kohya.safetensors"
    save_file(tensors, path, metadata={"ss_network_dim": "6", "sshs_model_hash": "ab" * 32})
    return path


def loaded(name: str, path: Path) -> dict[str, Tensor]:
    """Return the updates of all modules after the pipeline's own loading of a file into new models."""
    pipeline, make, part = MODELS[name]
    keyword = {"unet_config": make().config} if name == "sdxl" else {}
    found = pipeline.lora_state_dict(path, return_lora_metadata=True, **keyword)
    tensors, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    models = {part: make()}
    load = getattr(pipeline, f"load_lora_into_{part}")
    keywords = {part: models[part], "metadata": metadata, "low_cpu_mem_usage": False}
    # Pipelines that never knew alphas take none.
    if "network_alphas" in inspect.signature(load).parameters:
        keywords["network_alphas"] = alphas
    load(tensors, **keywords)
    for encoder in {"sd15": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}.get(name, []):
        models[encoder] = text_encoder()
        pipeline.load_lora_into_text_encoder(
            tensors,
            network_alphas=alphas,
            text_encoder=models[encoder],
            prefix=encoder,
            metadata=metadata,
            low_cpu_mem_usage=False,
        )
    return {
        f"{label}.{key}": layer.get_delta_weight(layer.active_adapters[0]).detach()
        for label, model in models.items()
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
