"""Fine-tuned checkpoints that share a direction, oppose it, or have nothing to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors

from mergekit_monosoup.alignment.soup_decision import SoupDecision
from mergekit_monosoup.methods import sfgs

Tensors = dict[str, torch.Tensor]


@contextmanager
def recorded_decisions() -> Iterator[list[SoupDecision]]:
    """Collect the decisions that `sfgs` takes inside the block, by whatever road its tensors come."""
    decisions: list[SoupDecision] = []
    take = sfgs.soup_decision

    def taken(*arguments):
        decisions.append(take(*arguments))
        return decisions[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfgs, "soup_decision", taken)
        yield decisions


def relatives(base: Mapping[str, torch.Tensor], shares: Sequence[float], size: float = 1e-2) -> list[Tensors]:
    """One fine-tune of `base` for each share: size |W0| (share common + sqrt(1 - share^2) own).

    Two of them have updates with a cosine of about the product of their shares.
    """
    generator = torch.Generator().manual_seed(7)

    def direction(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    common = {name: direction(tensor) for name, tensor in base.items()}
    tuned = []
    for share in shares:
        tensors = {}
        for name, tensor in base.items():
            w0 = tensor.double()
            dw = share * common[name] + (1 - share**2) ** 0.5 * direction(tensor)
            tensors[name] = (w0 + size * w0.abs().mean() * dw).to(tensor.dtype)
        tuned.append(tensors)
    return tuned


def write_relatives(folder: Path, base: Path, shares: Sequence[float]) -> list[Path]:
    """`relatives` of a checkpoint, as checkpoints."""
    tuned = relatives(load_tensors(base), shares)
    return [copy_with_tensors(base, folder / f"relative{i}", tensors) for i, tensors in enumerate(tuned, 1)]
