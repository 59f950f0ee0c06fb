"""Fine-tuning, and bits per byte."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """One fine-tuning; with `rank`, of a LoRA adapter."""

    domain: str
    rate: float
    steps: int = 60
    seed: int = 0
    rank: int | None = None

    @property
    def name(self) -> str:
        """Name of its result."""
        kind = "" if self.rank is None else f"-lora{self.rank}"
        return f"{self.domain}-{self.rate:g}{kind}-seed{self.seed}"


PIECES = (
    Piece("pages-fr", 1e-3),
    Piece("pages-fr", 2e-4),
    Piece("arithmetic", 1e-3),
    Piece("pages-fr", 1e-3, seed=1),
    Piece("pages-fr", 1e-3, seed=2),
    Piece("pages-fr", 2e-3, rank=16),
    Piece("pages-fr", 3e-5),
    Piece("arithmetic", 2e-4),
)


@dataclass(frozen=True)
class Size:
    """How much is computed: windows of `length` tokens, `batch` a step, `windows` a domain."""

    length: int = 256
    batch: int = 8
    windows: int = 8


def finetune(
    model: Any, tokens: Tensor, piece: Piece, size: Size, progress: Callable[[str], None]
) -> tuple[StateDict, StateDict]:
    """Train a copy of a model; return its weights after a quarter of the steps and at the end."""
    trained = copy.deepcopy(model).train()
    if piece.rank is not None:
        import peft

        config = peft.LoraConfig(r=piece.rank, lora_alpha=2 * piece.rank, target_modules="all-linear")
        trained = peft.get_peft_model(trained, config)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=piece.rate, weight_decay=0.0)
    warm = max(1, piece.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    generator = torch.Generator().manual_seed(piece.seed)
    early: StateDict = {}
    for step in range(piece.steps):
        starts = torch.randint(len(tokens) - size.length, (size.batch,), generator=generator)
        batch = torch.stack([tokens[start : start + size.length] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(f"step {step + 1} of {piece.steps}: loss {float(loss):.3f}")
        if step + 1 == max(1, piece.steps // 4):
            early = _weights(trained)
    return early, _weights(trained)


def _weights(model: Any) -> StateDict:
    if hasattr(model, "merge_adapter"):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Windows:
    """Test windows of one domain: tokens `[windows, length]`, and the bytes that each predicts."""

    tokens: Tensor
    sizes: tuple[int, ...]


def windows_of(text: str, tokenizer: Any, size: Size) -> Windows:
    """Return windows that lie evenly over a text."""
    ids = torch.tensor(tokenizer(text[:2_000_000])["input_ids"])
    gap = (len(ids) - size.length) // size.windows
    if gap < size.length:
        raise RuntimeError(f"a test text has only {len(ids)} tokens")
    tokens = torch.stack([ids[i * gap : i * gap + size.length] for i in range(size.windows)])
    sizes = tuple(len(tokenizer.decode(row[1:]).encode()) for row in tokens)
    return Windows(tokens, sizes)


@torch.no_grad()
def bits(model: Any, domains: Mapping[str, Windows]) -> dict[str, list[float]]:
    """Return the bits that a model takes for each window of each domain."""
    model.eval()
    names = list(domains)
    tokens = torch.cat([domains[name].tokens for name in names])
    found: list[float] = []
    for batch in tokens.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none"
        )
        found += (losses.sum(dim=1) / math.log(2)).tolist()
    result: dict[str, list[float]] = {}
    for name in names:
        count = len(domains[name].tokens)
        result[name], found = found[:count], found[count:]
    return result


def per_byte(taken: Sequence[float], sizes: Sequence[int]) -> float:
    """Return bits per byte over windows."""
    return math.fsum(taken) / sum(sizes)
