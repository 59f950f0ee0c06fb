"""The language track: a byte-level Qwen3, pre-trained on five domains and fine-tuned on English prose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_scheduler,
    set_seed,
)

from .text import corpus
from .track import Progress, Recipe

CONTEXT = 128
BATCH = 8
# What end-of-document is in the text; the tokenizer writes it as END.
END_ID = 0
END = "<|endoftext|>"
FINE_TUNED_ON = "prose"
SHIFTS = ("python", "headers", "licences", "tables")
# Prose is a part of pre-training, and a small one, so that fine-tuning has something to improve.
MIXTURE = {"prose": 0.10, "python": 0.40, "headers": 0.25, "licences": 0.15, "tables": 0.10}
PRETRAINING_SEED = 0
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """How much the track computes: the full study, or its short form."""

    pretraining: Recipe
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    windows: int


FULL = Size(
    pretraining=Recipe("pre-training", 2e-3, "cosine", 2800, weight_decay=0.1),
    recipes=(
        Recipe("M-1", 3e-4, "cosine", 160),
        Recipe("M-2", 1e-3, "constant_with_warmup", 200),
        Recipe("M-3", 2e-3, "linear", 280),
        Recipe("LoRA", 2e-3, "cosine", 200, lora_rank=8),
    ),
    seeds=(0, 1, 2),
    windows=96,
)
SHORT = Size(
    pretraining=Recipe("pre-training", 3e-3, "cosine", 160, weight_decay=0.1),
    recipes=(
        Recipe("M-1", 1e-3, "cosine", 16),
        Recipe("M-3", 2e-3, "linear", 20),
        Recipe("LoRA", 2e-3, "cosine", 16, lora_rank=8),
    ),
    seeds=(0, 1),
    windows=16,
)


class LanguageTrack:
    """A byte-level language model; in distribution is English prose, the shifts are the other domains."""

    name = "language"
    measure = "bits per byte"
    higher_is_better = False
    validation = "prose (validation)"
    in_distribution = "prose"
    shifts = SHIFTS
    architecture = (
        "Qwen3ForCausalLM, 1.8 M parameters: 6 blocks, hidden size 160, MLP 480, 4 heads of 32 "
        "(2 for keys and values), 256 token ids = byte values, tied embeddings"
    )

    def __init__(self, short: bool) -> None:
        self.size = SHORT if short else FULL
        self.recipes = self.size.recipes
        self.seeds = self.size.seeds

    def pretrain(self, out: Path, progress: Progress) -> None:
        """Train the base on the mixture and write it with its tokenizer."""
        set_seed(PRETRAINING_SEED)
        model = build_model()
        texts = {name: training_bytes(name) for name in MIXTURE}
        train(model, Batches(texts, MIXTURE, PRETRAINING_SEED), self.size.pretraining, progress)
        save(model, out)

    def finetune(self, base: Path, recipe: Recipe, seed: int, out: Path, progress: Progress) -> None:
        """Train the base further on prose alone; a LoRA recipe writes the adapter."""
        set_seed(seed)
        model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
        # The base has its own seed; fine-tunes shall not draw its batches once more.
        batches = Batches({FINE_TUNED_ON: training_bytes(FINE_TUNED_ON)}, {FINE_TUNED_ON: 1.0}, 1000 + seed)
        if recipe.lora_rank is None:
            train(model, batches, recipe, progress)
            save(model, out)
            return
        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=2 * recipe.lora_rank,
            target_modules=LORA_LAYERS,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        train(adapted, batches, recipe, progress)
        adapted.save_pretrained(out)

    def scores(self, checkpoint: Path) -> dict[str, float]:
        """Return the bits per byte of each held-out text, on the same windows for every checkpoint."""
        model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return {name: bits_per_byte(model, windows) for name, windows in self._tests().items()}

    def activations(self, checkpoint: Path) -> dict[str, list[Tensor]]:
        """Return every block's output at every eighth position of a few held-out windows."""
        model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tests = self._tests()
        inputs = {
            "id": tests[self.in_distribution][:16],
            "ood": torch.cat([tests[name][: 16 // len(SHIFTS)] for name in SHIFTS]),
        }
        return {name: block_outputs(model, windows) for name, windows in inputs.items()}

    def data_card(self) -> dict[str, object]:
        """Return sources, sizes and SHA-256 of every domain's splits, and what is measured on them."""
        return {
            "domains": {name: corpus(name).card() for name in MIXTURE},
            "mixture": dict(MIXTURE),
            "measured": f"{self.size.windows} windows of {CONTEXT} bytes of each text",
        }

    def _tests(self) -> dict[str, Tensor]:
        texts = {self.validation: corpus(FINE_TUNED_ON).splits["validation"]}
        texts |= {name: corpus(name).splits["test"] for name in (FINE_TUNED_ON, *SHIFTS)}
        return {name: evenly_spaced(text, self.size.windows) for name, text in texts.items()}


class Batches:
    """Random windows of the texts, drawn in given shares with a generator of their own."""

    def __init__(self, texts: Mapping[str, Tensor], shares: Mapping[str, float], seed: int) -> None:
        self.texts = list(texts.values())
        self.shares = torch.tensor([shares[name] for name in texts], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """Return `[BATCH, CONTEXT]` token ids."""
        rows = []
        for i in torch.multinomial(self.shares, BATCH, replacement=True, generator=self.generator).tolist():
            text = self.texts[i]
            start = int(torch.randint(len(text) - CONTEXT + 1, (), generator=self.generator))
            rows.append(text[start : start + CONTEXT])
        return torch.stack(rows).long()


def training_bytes(domain: str) -> Tensor:
    """Return a domain's training text as uint8 token ids."""
    return torch.frombuffer(bytearray(corpus(domain).splits["train"]), dtype=torch.uint8)


def evenly_spaced(text: bytes, windows: int) -> Tensor:
    """Return `[windows, CONTEXT]` token ids from the whole length of the text, without overlap."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    whole = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return whole[torch.linspace(0, len(whole) - 1, windows).long()]


def build_model() -> Qwen3ForCausalLM:
    """Return an untrained model."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return Qwen3ForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are byte values; NUL, which no text has, is the end of one."""
    # GPT-2's printable stand-ins for the 256 bytes, in byte order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    letter[END_ID] = END
    tokenizer = Tokenizer(models.BPE(vocab={letter[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write a checkpoint with the tokenizer."""
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def train(model: Qwen3ForCausalLM | PeftModel, batches: Batches, recipe: Recipe, progress: Progress) -> None:
    """Train with AdamW, a tenth of warm-up at most 100 steps long, and gradients clipped at norm 1."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    scheduler = get_scheduler(
        recipe.schedule,
        optimiser,
        num_warmup_steps=min(100, recipe.steps // 10),
        num_training_steps=recipe.steps,
    )
    model.train()
    for step in range(1, recipe.steps + 1):
        tokens = batches.draw()
        loss = mean_loss(model, tokens)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        scheduler.step()
        progress(step, recipe.steps, loss.item() / math.log(2))
    model.eval()


def mean_loss(model: Qwen3ForCausalLM | PeftModel, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of every byte but the first of each window."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def bits_per_byte(model: Qwen3ForCausalLM, windows: Tensor) -> float:
    """Return the mean cost in bits of every byte but the first of each window, `[windows, CONTEXT]`."""
    parts = windows.split(2 * BATCH)
    total = math.fsum(mean_loss(model, part).item() * len(part) for part in parts)
    return total / len(windows) / math.log(2)


@torch.inference_mode()
def block_outputs(model: Qwen3ForCausalLM, windows: Tensor) -> list[Tensor]:
    """Return each block's output at every eighth position, `[windows * CONTEXT / 8, hidden size]` float64."""
    outputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        outputs.append(hidden[:, 7::8].flatten(0, 1).double())

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    try:
        model(input_ids=windows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
