"""Small real checkpoints: written by transformers, tokenizers and peft, seeded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS + LETTERS.upper() + "0123456789 .,:;!?'\"()+-*/=<>\n_"
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n"), ("o", "u"))
LAYERS = 3
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
ARCHITECTURES = {
    "qwen3-tied": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, True),
    "qwen3-untied": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, False),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, False),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEXT = "the answer is in one tin"


def build_tokenizer(extra: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A character-level BPE tokenizer with a few merges, the same every time."""
    tokens = [*SPECIAL, *dict.fromkeys(CHARACTERS), *(a + b for a, b in MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(MERGES), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    if extra:
        fast.add_tokens(list(extra))
    return fast


VOCABULARY = len(build_tokenizer())


def build_model(architecture: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A randomly initialised model in float32, with norms that are not all ones."""
    config_class, model_class, tied = ARCHITECTURES[architecture]
    options = {**SIZES, "vocab_size": VOCABULARY, "tie_word_embeddings": tied, **changes}
    config = config_class(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def structured_update(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A low-rank update under noise, Frobenius norm 1: what fine-tuning leaves."""
    noise = torch.randn(shape, generator=generator)
    update = noise / noise.norm()
    if len(shape) == 2:
        rank = max(2, min(shape) // 8)
        left = torch.randn(shape[0], rank, generator=generator)
        right = torch.randn(rank, shape[1], generator=generator)
        low_rank = (left / torch.arange(1.0, rank + 1)) @ right
        update = low_rank / low_rank.norm() + 0.5 * update
    return update / update.norm()


def fine_tune(model: torch.nn.Module, seed: int, relative: float = 1e-2) -> torch.nn.Module:
    """A copy whose every tensor has moved by `relative` of its norm."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            update = structured_update(parameter.shape, generator)
            parameter.add_(relative * parameter.norm() * update)
    return tuned


def write_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    dtype: torch.dtype,
    *,
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write the model in `dtype` by `save_pretrained`, and a tokenizer beside it."""
    written = copy.deepcopy(model).to(dtype)
    written.config.dtype = dtype
    if hasattr(written, "generation_config"):
        written.generation_config.do_sample = False
    written.save_pretrained(folder, max_shard_size=max_shard_size)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Family:
    """A base checkpoint and its fine-tuned variants, as folders."""

    base: Path
    tuned: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.base, *self.tuned)


def write_family(
    folder: Path,
    architecture: str,
    dtype: torch.dtype,
    *,
    tuned: int = 2,
    max_shard_size: str | int = "5GB",
) -> Family:
    """A base and `tuned` fine-tuned variants of it, all in `dtype`."""
    base = build_model(architecture)
    models = {"base": base} | {
        f"tuned{i}": fine_tune(base, seed=i, relative=1e-2 * (1 + i / 2)) for i in range(1, tuned + 1)
    }
    for name, model in models.items():
        write_checkpoint(folder / name, model, dtype, max_shard_size=max_shard_size)
    return Family(folder / "base", tuple(folder / f"tuned{i}" for i in range(1, tuned + 1)))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / n for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / "model.safetensors"]


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint written as safetensors, sharded or not."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update(load_file(file))
    return tensors


def copy_with_tensors(source: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """The checkpoint `source` again, everything but its weights as it was."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if ".safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy_as_bin(source: Path, folder: Path) -> Path:
    """The checkpoint `source` with its weights as `pytorch_model.bin`."""
    copy_with_tensors(source, folder, {})
    (folder / "model.safetensors").unlink()
    torch.save(load_tensors(source), folder / "pytorch_model.bin")
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    """Set keys of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 5, rank: int = 4) -> Path:
    """A PEFT LoRA adapter on `base`, its B factors filled as training would."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder
