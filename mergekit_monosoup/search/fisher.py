"""How much the base's predictions depend on each layer, as a first guess of how strong its update may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.report.figures import place
from mergekit_monosoup.search.functions import Loaded

_SEQUENCES, _LENGTH = 8, 64
# Factors that the search allows, too.
_MOST = 1.5


def sensitivities(
    model: nn.Module, updates: Iterable[tuple[str, Tensor]], seed: int = 0
) -> dict[int, tuple[float, float]]:
    """Return by layer the sums of F dW^2 and of dW^2 over the entries of its tensors.

    F is the diagonal of the Fisher information, the mean of the squared gradients of log p(y | x) over random
    sequences x with y drawn from the model's own p (arXiv 2603.21705 takes random tokens; Kunstner et al.,
    arXiv 1905.12558, on drawing y): 1/2 sum F dW^2 is what the update adds to the KL divergence from the base
    over a sequence, to the second order.

    Args:
        model: a causal language model of transformers, with the base's weights.
        updates: names of parameters with dW, float32; those without a layer's number are left out.
        seed: of tokens and draws.

    Raises:
        ConfigurationError: the model has no logits over tokens.
    """
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(words, int):
        raise ConfigurationError("--by fisher needs a causal language model; take --by layer-group")
    for _ in range(_SEQUENCES):
        tokens = torch.randint(words, (1, _LENGTH), generator=generator)
        logits = getattr(model(input_ids=tokens), "logits", None)
        if logits is None or logits.shape[:2] != tokens.shape:
            raise ConfigurationError("--by fisher needs a causal language model; take --by layer-group")
        logs = torch.log_softmax(logits[0].float(), dim=-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        said = logs.gather(1, drawn).sum()
        gradients = torch.autograd.grad(said, list(parameters.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square.add_(gradient.float().square(), alpha=1 / _SEQUENCES)
    found: dict[int, tuple[float, float]] = {}
    for name, update in updates:
        layer = place(name).layer
        if layer is None or name not in squares:
            continue
        weighted, plain = found.get(layer, (0.0, 0.0))
        entries = update.float().square()
        found[layer] = weighted + float((squares[name] * entries).sum()), plain + float(entries.sum())
    return found


def group_factors(found: dict[int, tuple[float, float]], groups: int) -> list[float]:
    """Return factors for points evenly along the depth: the less, the more the base depends on what is there.

    The factor of a group is (s / s_g)^(1/2), at most 1.5, where s_g = sum F dW^2 / sum dW^2 over its layers
    and s is the geometric mean of all: each group then adds as much to the divergence for its size.

    Args:
        found: of `sensitivities`.
        groups: how many.
    """
    if not found:
        return [1.0] * groups
    last = max(max(found), 1)
    sums = [[0.0, 0.0] for _ in range(groups)]
    for layer, (weighted, plain) in found.items():
        group = sums[round(layer / last * (groups - 1))]
        group[0] += weighted
        group[1] += plain
    rates = [weighted / plain if weighted > 0 and plain > 0 else None for weighted, plain in sums]
    known = [math.log(rate) for rate in rates if rate is not None]
    mean = math.fsum(known) / len(known) if known else 0.0
    return [1.0 if rate is None else min(_MOST, math.exp((mean - math.log(rate)) / 2)) for rate in rates]


def guess(base: Path, finetuned: Path, groups: int) -> list[float]:
    """Return `group_factors` of two checkpoints that transformers loads.

    Raises:
        ConfigurationError: they are no causal language models.
    """
    start, end = Loaded(base), Loaded(finetuned)
    theirs = dict(end.model.named_parameters())

    def updates() -> Iterator[tuple[str, Tensor]]:
        for name, own in start.model.named_parameters():
            other = theirs.get(name)
            if other is not None and other.shape == own.shape:
                yield name, other.detach().float() - own.detach().float()

    return group_factors(sensitivities(start.model, updates()), groups)
