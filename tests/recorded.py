"""Models of libraries that need torchvision, as recorded lists of their tensors.

Each file of tests/data names the library and version that built the model (small widths, all parts)
and maps every name of its state dict to shape and dtype.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import torch
from rounding import as_float64

from mergekit_monosoup.spectral.matrix import choose_view

DATA = Path(__file__).parent / "data"
RECORDED = ("open_clip_vit", "timm_vit", "timm_convnext", "timm_convnextv2_conv_mlp", "timm_resnet")
State = dict[str, torch.Tensor]


def state_dict(model: str, seed: int = 0) -> State:
    """A random state dict with the names, shapes and dtypes of a recorded model."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (shape, dtype) in json.loads((DATA / f"{model}.json").read_text())["tensors"].items():
        if dtype == "int64":
            state[name] = torch.full(shape, 100)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    return state


def fine_tuned(base: State, seed: int = 1) -> State:
    """The state dict after training: all weights moved, counters counted on."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.01 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t + 50
        for name, t in base.items()
    }


def assert_edited(merged: State, base: State, tuned: State, **options: object) -> None:
    """Every matrix as the reference edits it, everything else as the fine-tuned model has it."""
    assert list(merged) == list(tuned) or set(merged) == set(tuned)
    for name, w1 in tuned.items():
        plain = name.removeprefix("module.")
        view = choose_view(tuple(w1.shape), plain)
        assert merged[name].dtype == w1.dtype
        if not w1.is_floating_point() or not view.decomposes:
            assert torch.equal(merged[name], w1), name
            continue
        w0 = base[name]
        dw = (as_float64(w1) - as_float64(w0)).reshape(view.shape)
        edited = np.stack([oracle.monosoup_update(m, **options)[0] for m in dw]).reshape(w1.shape)
        error = np.abs(as_float64(merged[name]) - as_float64(w0) - edited).max()
        assert error <= 5e-5 * np.abs(dw).max(), name
