"""The model families that are merged in the tests: how to build them small, and what mergekit does.

`FAMILIES` is also the source of the table in docs/models.md (tests/models_table.py): a row of it is
true because test_families.py has shown it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import save_file

H = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 96,
}
KV = {**H, "num_key_value_heads": 2}
DECODER = {**KV, "head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
VISION = {k: v for k, v in H.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
DEEPSTACK = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(model: torch.nn.Module) -> torch.Tensor:
    output = model(input_ids=torch.arange(3, 11)[None])
    return output.logits if "logits" in output else output.last_hidden_state


def encoder_decoder(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 11)[None]
    return model(input_ids=ids, decoder_input_ids=ids).logits


def speech(model: torch.nn.Module) -> torch.Tensor:
    features = torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32)
    return model(input_features=features, decoder_input_ids=torch.arange(3, 7)[None]).logits


def image(model: torch.nn.Module) -> torch.Tensor:
    return model(pixel_values=torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)).logits


def image_and_text(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    return model(pixel_values=pixels, input_ids=torch.arange(3, 11)[None]).logits_per_image


def gemma_image(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    return torch.cat([tokens(model).flatten(), features.flatten()])


def qwen_image(model: torch.nn.Module) -> torch.Tensor:
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.linspace(-1, 1, 16 * 3 * 2 * 4 * 4).reshape(16, -1)
    features = model.model.get_image_features(pixel_values=pixels, image_grid_thw=grid).pooler_output
    return torch.cat([tokens(model).flatten(), *(f.flatten() for f in features)])


@dataclass(frozen=True)
class Family:
    """One class of models.

    stock: what `mergekit-yaml` 0.1.5 does: "complete", "refuses" or "loses"; `reason` is part of its
    message, or the number of tensors lost. renamed: the file's name for a tensor, instead of the one
    that `save_pretrained` writes. fused: tensors of the input that end up in a larger one.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    forward: Callable[[torch.nn.Module], torch.Tensor] = tokens
    stock: str = "complete"
    reason: str = ""
    fused: str = ""
    base_layout: Callable[[Path, torch.nn.Module], None] | None = None
    tuned_layout: Callable[[Path, torch.nn.Module], None] | None = None
    note: str = ""

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "-", self.name).strip("-").lower()


def fused_files(folder: Path, model: torch.nn.Module) -> None:
    """Replace the weights by those of the modules themselves, experts fused."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def hub_gemma(folder: Path, model: torch.nn.Module) -> None:
    """The names that Gemma 3's published files have: the vision tower one module deeper."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    old = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", n): t for n, t in tensors.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


def _gemma_vl() -> torch.nn.Module:
    vision = {**VISION, "vision_use_head": False}
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=DECODER, vision_config=vision, mm_tokens_per_image=4)
    )


def _qwen_moe() -> torch.nn.Module:
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**DECODER, **MOE))


EXPERTS = r"\.experts\.\d+\."
ABSENT = "required but not present"
FAMILIES = (
    Family("Qwen3", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER))),
    Family("Qwen3, tied", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, tie_word_embeddings=True))),
    Family(
        "Qwen3-MoE, a file entry for each expert",
        _qwen_moe,
        fused=EXPERTS,
        note="experts are written fused, as transformers 5 holds them",
    ),
    Family("Qwen3-MoE, fused", _qwen_moe, base_layout=fused_files, tuned_layout=fused_files),
    Family("Qwen3-MoE, base by expert, fine-tuned fused", _qwen_moe, fused=EXPERTS, tuned_layout=fused_files),
    Family(
        "Mixtral",
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**KV, num_local_experts=4)),
        fused=EXPERTS + r"|block_sparse_moe\.gate",
        note="written under the names of transformers 5 (`mlp.experts`, not `block_sparse_moe`)",
    ),
    Family("Llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**KV))),
    Family(
        "Llama 4, text",
        lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                **DECODER, intermediate_size_mlp=64, num_local_experts=2, interleave_moe_layer_step=2
            )
        ),
        note="inferred by mergekit",
    ),
    Family("Gemma 3, text", lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER))),
    Family(
        "Gemma 3, vision-language, published names",
        _gemma_vl,
        gemma_image,
        base_layout=hub_gemma,
        tuned_layout=hub_gemma,
    ),
    Family(
        "Gemma 3, vision-language, saved by transformers 5",
        _gemma_vl,
        gemma_image,
        stock="refuses",
        reason=ABSENT,
        note="mergekit's list has `vision_tower.vision_model.`, transformers 5 writes `vision_tower.`",
    ),
    Family("Mistral", lambda: t.MistralForCausalLM(t.MistralConfig(**KV))),
    Family(
        "Phi-3",
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**KV, pad_token_id=0)),
        note="qkv_proj and gate_up_proj are one matrix each",
    ),
    Family(
        "Qwen2.5-VL",
        lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config={**KV, "rope_parameters": ROPE},
                vision_config={**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16},
            )
        ),
        qwen_image,
    ),
    Family(
        "Qwen3-VL",
        lambda: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(text_config={**DECODER, "rope_parameters": ROPE}, vision_config=DEEPSTACK)
        ),
        qwen_image,
        note="mergekit's list has three deepstack mergers, as the published models have",
    ),
    Family(
        "Qwen3-VL-MoE",
        lambda: t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(
                text_config={**DECODER, **MOE, "rope_parameters": ROPE}, vision_config=DEEPSTACK
            )
        ),
        qwen_image,
    ),
    Family(
        "GPT-2",
        lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        ),
        note="weights are `[in, out]`: same singular values",
    ),
    Family(
        "BERT (BertModel, most embedding models)",
        lambda: t.BertModel(t.BertConfig(**H)),
        stock="refuses",
        reason="can only concatenate list",
        note="optional weights with aliases stop mergekit's planner",
    ),
    Family(
        "BERT, masked LM",
        lambda: t.BertForMaskedLM(t.BertConfig(**H)),
        stock="refuses",
        reason=ABSENT,
        note="mergekit's list has a pooler, the class has none",
    ),
    Family(
        "BERT, classification",
        lambda: t.BertForSequenceClassification(t.BertConfig(**H)),
    ),
    Family(
        "RoBERTa (RobertaModel)",
        lambda: t.RobertaModel(t.RobertaConfig(**H)),
        stock="refuses",
        reason=ABSENT,
        note="mergekit's list has the prefix `roberta.`, the class has not",
    ),
    Family("RoBERTa, masked LM", lambda: t.RobertaForMaskedLM(t.RobertaConfig(**H))),
    Family(
        "ModernBERT",
        lambda: t.ModernBertModel(t.ModernBertConfig(**H, **SPECIAL, cls_token_id=1, sep_token_id=2)),
        note="inferred by mergekit",
    ),
    Family(
        "ModernBERT, masked LM",
        lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**H, **SPECIAL, cls_token_id=1, sep_token_id=2)),
        note="inferred by mergekit",
    ),
    Family(
        "T5 1.1, Flan-T5",
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        encoder_decoder,
    ),
    Family(
        "T5 1.0",
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
        encoder_decoder,
        stock="refuses",
        reason=ABSENT,
        note="mergekit's list has `wi_0` and `wi_1`, T5 1.0 has `wi`",
    ),
    Family(
        "Whisper",
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=96,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
                decoder_start_token_id=1,
                **SPECIAL,
            )
        ),
        speech,
        stock="refuses",
        reason=ABSENT,
        note="mergekit's list has `model.decoderembed_tokens`",
    ),
    Family(
        "Mamba",
        lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
        ),
    ),
    Family("OLMo", lambda: t.OlmoForCausalLM(t.OlmoConfig(**KV)), note="inferred by mergekit"),
    Family(
        "OLMoE",
        lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**KV, num_experts=4, num_experts_per_tok=2)),
        fused=EXPERTS,
        note="inferred by mergekit",
    ),
    Family(
        "GPT-OSS (bf16)",
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)),
        note="inferred by mergekit; the published mxfp4 files are refused",
    ),
    Family(
        "CLIP",
        lambda: t.CLIPModel(
            t.CLIPConfig(text_config={**H, **SPECIAL}, vision_config=VISION, projection_dim=16)
        ),
        image_and_text,
        stock="refuses",
        reason="get_input_embeddings",
        note="cannot be inferred by mergekit",
    ),
    Family(
        "ViT, classification",
        lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
        image,
        stock="loses",
        reason="32",
        note="mergekit looks for the names that transformers 5 uses in memory, and writes 8 of 40 tensors",
    ),
    Family(
        "ConvNeXt, classification",
        lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=16, patch_size=4)
        ),
        image,
        stock="refuses",
        reason="get_input_embeddings",
        note="cannot be inferred by mergekit",
    ),
)
BY_KEY = {family.key: family for family in FAMILIES}


def write_pair(family: Family, folder: Path) -> tuple[Path, Path]:
    """A random base in float32 and a fine-tuned copy, as `save_pretrained` writes them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = family.build().float().eval()
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        folders = []
        for name, layout in (("base", family.base_layout), ("tuned", family.tuned_layout)):
            model.save_pretrained(folder / name)
            if layout is not None:
                layout(folder / name, model)
            folders.append(folder / name)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return folders[0], folders[1]
