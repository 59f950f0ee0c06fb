"""Model Stock and SFGS of `base+adapter` inputs: updates by the factors, not by the rounded merge."""

from __future__ import annotations

import baselines
import numpy as np
import pytest
import torch
from adapters import base_model, make_adapter
from lora_merges import exact_updates, merged, recipe, write_base
from rounding import assert_correctly_rounded

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


@pytest.fixture
def soup(tmp_path):
    """A bf16 base with three small adapters on it: dW far below the spacing of the weights."""
    base = write_base("plain", tmp_path / "base")
    adapters = [
        make_adapter("plain", tmp_path / f"adapter{i}", seed=i, scale=0.01, base_dtype=torch.bfloat16)
        for i in range(3)
    ]
    w0 = {n: t.bfloat16().double().numpy() for n, t in base_model("plain").state_dict().items()}
    tuned = []
    for adapter in adapters:
        dw = exact_updates("plain", adapter)
        tuned.append({name: w0[name] + dw.get(name, 0.0) for name in w0})
    return base, adapters, w0, tuned


def test_model_stock_takes_the_angles_of_the_factors(soup, tmp_path):
    base, adapters, w0, tuned = soup
    config = recipe(base, *(f"{base}+{adapter}" for adapter in adapters), merge_method="model_stock_stable")
    tensors = merged(tmp_path, config)
    for name, tensor in tensors.items():
        expected = baselines.model_stock(w0[name], [model[name] for model in tuned])
        assert_correctly_rounded(tensor, expected, torch.bfloat16)
        if all(np.array_equal(model[name], w0[name]) for model in tuned):
            assert np.array_equal(tensor.double().numpy(), w0[name])


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_sfgs_decides_and_averages_by_the_factors(soup, tmp_path, threshold, caplog):
    base, adapters, w0, tuned = soup
    config = recipe(
        base,
        *(f"{base}+{adapter}" for adapter in adapters),
        merge_method="sfgs",
        parameters={"threshold": threshold},
    )
    with caplog.at_level("INFO"):
        tensors = merged(tmp_path, config)
    taken, averages = baselines.sfgs(w0, tuned, threshold)
    (decision,) = [r.getMessage() for r in caplog.records if "Greedy Soup took" in r.getMessage()]
    for average in averages.values():
        assert f"{average:.4f}" in decision
    for name, tensor in tensors.items():
        expected = sum(tuned[index][name] for index in taken) / len(taken)
        assert_correctly_rounded(tensor, expected, torch.bfloat16)
