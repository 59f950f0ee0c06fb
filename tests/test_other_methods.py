"""Other people's merge methods through our command: what stock mergekit-yaml writes, and the same twice."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_tensors
from click.testing import CliRunner
from commands import forget_loaders, merge, write_config

from mergekit_monosoup.cli import main
from mergekit_monosoup.spectral.crew import torch_threads

pytestmark = pytest.mark.usefixtures("registered")

WEIGHTED = {
    "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "multislerp", "nuslerp", "linear",
    "dare_ties", "dare_linear", "della", "della_linear",
}  # fmt: skip
RANDOM = ("dare_ties", "dare_linear", "della", "della_linear")
IN_FLOAT32 = ("arcee_fusion", "ramplus_tl")
TWO_MODELS = ("slerp", "nearswap", "arcee_fusion")
METHODS = (
    "linear", "slerp", "nuslerp", "passthrough", "model_stock", "arcee_fusion", "karcher",
    "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "multislerp", "nearswap", "ram",
    "ramplus_tl", "sce",
)  # fmt: skip


def recipe_for(method, models, **keys):
    base, tuned = str(models.base), [str(folder) for folder in models.tuned]
    listed = {
        "linear": [base, *tuned],
        "karcher": [base, *tuned],
        "passthrough": tuned[:1],
        **dict.fromkeys(TWO_MODELS, tuned[:1]),
    }.get(method, tuned)
    entries = [{"model": model} for model in listed]
    if method in WEIGHTED:
        for index, entry in enumerate(entries, 1):
            entry["parameters"] = {"weight": 0.3 * index}
    config = {"merge_method": method, "models": entries, "dtype": "bfloat16", **keys}
    if method not in ("linear", "karcher", "passthrough"):
        config["base_model"] = base
    if method in ("slerp", "nearswap"):
        config["parameters"] = {"t": 0.4 if method == "slerp" else 1e-3}
    return config


def ours(folder, config, *options):
    forget_loaders()
    out = folder / "ours"
    result = CliRunner().invoke(main, ["merge", str(write_config(folder, config)), str(out), *options])
    forget_loaders()
    assert result.exit_code == 0, result.output
    return load_tensors(out)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_stock_mergekit(tmp_path, family, method):
    config = recipe_for(method, family("qwen3-tied", "bf16"))
    expected, found = merge(tmp_path, config), ours(tmp_path, config)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # Two of them return float32 whatever the recipe's dtype is; ours stores what the recipe says.
        assert tensor.dtype == (torch.float32 if method in IN_FLOAT32 else torch.bfloat16)
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_output_types(tmp_path, family, out_dtype):
    config = recipe_for("task_arithmetic", family("llama", "bf16"), out_dtype=out_dtype)
    del config["dtype"]
    expected, found = merge(tmp_path, config), ours(tmp_path, config)
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{out_dtype}"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_give_the_same_for_one_seed(tmp_path, family, method):
    """However many tensors are computed at a time."""
    config = recipe_for(method, family("qwen3-tied", "bf16"), parameters={"density": 0.5})
    found = []
    for seed, threads in ((1, 1), (1, 4), (2, 1)):
        with torch_threads(threads):
            out = tmp_path / f"{seed}-{threads}"
            found.append(ours(out, config, "--random-seed", str(seed)))
    first, second, other = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
