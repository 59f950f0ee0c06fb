"""Reports of every method and of every kind of input, and plans that agree with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import base_model, load_adapter, make_adapter, updates
from checkpoints import load_tensors
from commands import recipe
from soups import write_relatives
from test_plan import merged, planned

from mergekit_monosoup.report.reader import read_report

pytestmark = pytest.mark.usefixtures("registered", "one_thread")


def agree(plan, out):
    """Names, shapes and actions of a plan are those of the report beside the output."""
    report = read_report(out)
    assert {t.tensor: (t.shape, t.action) for t in plan.tensors} == {
        r.tensor: (r.shape, r.action) for r in report.records
    }
    assert {r.tensor for r in report.records} == set(load_tensors(out))
    return report


def test_model_stock(tmp_path, family):
    base = family("qwen3-tied", "fp32").base
    tuned = write_relatives(tmp_path, base, (0.9, 0.8))
    config = recipe(base, *tuned) | {"merge_method": "model_stock_stable"}
    out = merged(tmp_path, config)
    report = agree(planned(config), out)
    w0, w1, w2 = (load_tensors(folder) for folder in (base, *tuned))
    for record in report.records:
        a, b = ((w[record.tensor] - w0[record.tensor]).double().flatten() for w in (w1, w2))
        cosine = max(0.0, float(torch.nn.functional.cosine_similarity(a, b, 0)))
        assert record.figures["ratio"] == pytest.approx(2 * cosine / (1 + cosine), rel=1e-4)
        assert record.update_norm == pytest.approx(float((a + b).norm()) / 2, rel=1e-4)
        assert record.reason.startswith("ratio t = ")
    assert "Model Stock (" in (out / "README.md").read_text()


@pytest.mark.parametrize("threshold", [0.3, 0.99])
def test_sfgs(tmp_path, family, threshold):
    base = family("qwen3-tied", "fp32").base
    tuned = write_relatives(tmp_path, base, (0.9, 0.8, 0.0))
    config = recipe(base, *tuned, parameters={"threshold": threshold}) | {"merge_method": "sfgs"}
    out = merged(tmp_path, config)
    taken = tuned[:2] if threshold < 0.5 else tuned[:1]
    for record in read_report(out).records:
        assert record.action == ("averaged" if len(taken) > 1 else "kept")
        assert record.reason == "the soup is " + ", ".join(folder.name for folder in taken)
        assert record.figures == {"taken": len(taken)}
        assert record.parameters == {"threshold": threshold}
    assert f"took {len(taken)} of 3 checkpoints" in (out / "README.md").read_text()


def test_adapters_are_recorded_by_their_factors(tmp_path):
    """The merged copy in bfloat16 that mergekit hands over has another update: its rounding."""
    base = tmp_path / "base"
    base_model("plain").to(torch.bfloat16).save_pretrained(base)
    adapter = make_adapter("plain", tmp_path / "adapter")
    config = recipe(base, f"{base}+{adapter}")
    out = merged(tmp_path, config, "--lora-merge-cache", str(tmp_path / "cache"), "--no-copy-tokenizer")
    expected = updates(load_adapter("plain", adapter))
    found = {r.tensor: r for r in read_report(out).records}
    plan = {t.tensor: t for t in planned(config).tensors}
    assert set(plan) == set(found)
    touched = {f"{name.removeprefix('base_model.model.')}.weight": dw for name, dw in expected.items()}
    assert all(name in found for name in touched)
    for name, record in found.items():
        if name in touched:
            norm = np.linalg.norm(touched[name].double().numpy())
            assert record.update_norm == pytest.approx(norm, rel=1e-3)
            assert record.backend == "factors"
            assert plan[name].action == "edited"
        else:
            assert record.update_norm == 0
            assert record.reason == "no adapter touches it"
