"""Merges of `base+adapter` recipes, and what they should give."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from adapters import base_model, load_adapter, updates
from click.testing import CliRunner, Result
from commands import forget_loaders
from oracle import monosoup_update
from safetensors.torch import load_file

from mergekit_monosoup.cli import main


def write_base(kind: str, folder: Path, dtype: str = "bfloat16") -> Path:
    model = base_model(kind).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    return folder


def recipe(base: Path, *models: object, **keys: object) -> dict:
    parameters = keys.pop("parameters", {})
    return {
        "merge_method": "monosoup",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": parameters,
        "dtype": "bfloat16",
        **keys,
    }


def merge(tmp_path: Path, config: dict, out: str = "out", *options: str) -> Result:
    forget_loaders()
    file = tmp_path / f"{out}.yaml"
    file.write_text(yaml.safe_dump(config))
    arguments = [
        "merge",
        file,
        tmp_path / out,
        "--lora-merge-cache",
        tmp_path / "cache",
        "--no-copy-tokenizer",
    ]
    return CliRunner().invoke(main, [str(a) for a in [*arguments, "--quiet", *options]])


def merged(tmp_path: Path, config: dict, out: str = "out", *options: str) -> dict[str, torch.Tensor]:
    result = merge(tmp_path, config, out, *options)
    assert result.exit_code == 0, result.output
    tensors = {}
    for file in (tmp_path / out).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def oracle_edit(dw: np.ndarray, **options: object) -> np.ndarray:
    if dw.ndim == 1:
        return dw
    if dw.ndim == 3:
        return np.stack([monosoup_update(m, **options)[0] for m in dw])
    return monosoup_update(dw, **options)[0]


def exact_updates(kind: str, adapter: Path) -> dict[str, np.ndarray]:
    """dW in float32 of every tensor of the model, by its name: what peft's own merge adds."""
    base = base_model(kind).state_dict()
    after = load_adapter(kind, adapter).merge_and_unload().state_dict()
    factors = {}
    for name, dw in updates(load_adapter(kind, adapter)).items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if f"{plain}.weight" in base:
            factors[f"{plain}.weight"] = dw.double().numpy()
    return {
        n: factors.get(n, after[n].double().numpy() - base[n].double().numpy())
        for n in base
        if n in factors or not torch.equal(base[n], after[n])
    }


def lora_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the merge warned of about its adapters."""
    return [
        r.getMessage()
        for r in caplog.records
        if r.name.startswith("mergekit_monosoup.lora") and r.levelno >= logging.WARNING
    ]
