"""A small pair of Qwen3-architecture checkpoints, trained on text that every Python brings along.

Base: source code and English documentation of the standard library, half and half. Fine-tuned: the
same model, trained on with English alone, at a rate high enough to make it forget code.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

END = 256  # the one token beside the 256 bytes
CONTEXT = 128
BATCH = 8


class Corpus(NamedTuple):
    """Bytes to train on and bytes that no training sees."""

    train: torch.Tensor
    held_out: torch.Tensor


def english() -> Corpus:
    """Return the language reference that Python's `help()` shows."""
    from pydoc_data.topics import topics

    return _split([topics[name] for name in sorted(topics)])


def code() -> Corpus:
    """Return the top-level modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"))
    return _split([file.read_text(encoding="utf-8", errors="replace") for file in files])


def _split(texts: list[str]) -> Corpus:
    # Whole texts go to one side or the other; the order is shuffled once, with a seed of its own.
    random.Random(0).shuffle(texts)
    cut = max(1, len(texts) // 8)
    held_out, train = (
        torch.frombuffer(bytearray("\n".join(part).encode()), dtype=torch.uint8).long()
        for part in (texts[:cut], texts[cut:])
    )
    return Corpus(train, held_out)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are byte values."""
    # GPT-2's printable stand-ins for the 256 bytes, in byte order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {letter[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def build_model() -> Qwen3ForCausalLM:
    """Return an untrained model with the layer types of Qwen3-0.6B, about a thousand times smaller."""
    config = Qwen3Config(
        vocab_size=END + 1,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM,
    corpora: list[Corpus],
    *,
    steps: int,
    rate: float,
    progress: Callable[[int, float], None],
) -> None:
    """Train on random windows of the corpora, in equal shares, with AdamW and a cosine schedule."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    model.train()
    for step in range(steps):
        fraction = (step - warm_up) / max(1, steps - warm_up)
        factor = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * fraction))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        rows = [_window(corpora[i % len(corpora)].train) for i in range(BATCH)]
        tokens = torch.stack(rows)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress(step + 1, loss.item() / math.log(2))
    model.eval()


def _window(text: torch.Tensor) -> torch.Tensor:
    start = int(torch.randint(len(text) - CONTEXT, ()))
    return text[start : start + CONTEXT]


@torch.inference_mode()
def bits_per_byte(model: Qwen3ForCausalLM, corpus: Corpus, windows: int = 128) -> float:
    """Return the mean cost of a held-out byte, over evenly spaced windows."""
    starts = torch.linspace(0, len(corpus.held_out) - CONTEXT, windows).long()
    tokens = torch.stack([corpus.held_out[s : s + CONTEXT] for s in starts])
    losses = [model(input_ids=part, labels=part).loss.item() for part in tokens.split(BATCH)]
    return sum(losses) / len(losses) / math.log(2)


def write_pair(
    base: Path,
    finetuned: Path,
    progress: Callable[[str, int, float], None],
    steps: tuple[int, int] = (350, 150),
) -> None:
    """Train both models and save them in bfloat16, as checkpoints on the Hub are."""
    set_seed(0)
    tokenizer = build_tokenizer()
    stages = [
        ("base", base, [english(), code()], steps[0]),
        ("fine-tuned", finetuned, [english()], steps[1]),
    ]
    model = build_model()
    for name, folder, corpora, count in stages:
        train(
            model,
            corpora,
            steps=count,
            rate=2e-3,
            progress=lambda step, bits, name=name: progress(name, step, bits),
        )
        # What is stored is what the next stage starts from: the update is then that of the files.
        model = model.to(torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = model.float()
