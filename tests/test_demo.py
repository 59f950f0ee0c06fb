"""`make demo`, and the pair of models that it shows."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch
from commands import ROOT, installed
from safetensors.torch import load_file

PAIR = ROOT / "examples" / "models"
DOMAINS = {"prose", "python", "headers", "licences", "tables"}


@pytest.fixture
def demo(monkeypatch):
    """The example's module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo")


def test_the_pair_is_small():
    assert sum(file.stat().st_size for file in PAIR.rglob("*") if file.is_file()) < 9_000_000


def test_the_pair_differs_in_values_alone():
    base, finetuned = (load_file(PAIR / name / "model.safetensors") for name in ("base", "finetuned"))
    assert base.keys() == finetuned.keys()
    for name, w0 in base.items():
        assert w0.dtype == finetuned[name].dtype == torch.bfloat16
        assert w0.shape == finetuned[name].shape
        assert w0.isfinite().all()
        assert finetuned[name].isfinite().all()
        assert not torch.equal(w0, finetuned[name])
    first, second = (json.loads((PAIR / name / "config.json").read_text()) for name in ("base", "finetuned"))
    assert first == second


@pytest.mark.parametrize("name", ["base", "finetuned"])
def test_token_ids_are_bytes(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / name)
    text = "W = W₀ + α·ΔW\n"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize("name", ["base", "finetuned"])
def test_cards_say_how_the_models_were_made(name):
    card = (PAIR / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for word in ("seed", "learning rate", "SHA-256", "torch", "Licence"):
        assert word in card


def test_held_out_text_is_of_every_domain():
    files = {file.stem: file for file in (PAIR / "heldout").glob("*.txt")}
    assert set(files) == DOMAINS
    readme = (PAIR / "heldout" / "README.md").read_text(encoding="utf-8")
    for file in files.values():
        content = file.read_bytes()
        assert 10_000 < len(content) < 32_000
        assert b"\0" not in content
        content.decode()
        assert f"`{file.name}` | {len(content)} |" in readme


def test_the_base_knows_every_domain_and_the_fine_tune_forgot(demo):
    costs = {}
    for name in ("base", "finetuned"):
        model = demo.load_model(PAIR / name)
        for domain in ("prose", "python"):
            text = (PAIR / "heldout" / f"{domain}.txt").read_bytes()[:4096]
            costs[name, domain] = demo.bits_per_byte(model, text)
    assert costs["finetuned", "prose"] < costs["base", "prose"] < 4
    assert costs["finetuned", "python"] > costs["base", "python"]


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="the stock command must know the method")
def test_demo(demo, monkeypatch, tmp_path, capfd):
    threads = torch.get_num_threads()
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    try:
        demo.main()
    finally:
        torch.set_num_threads(threads)
    printed = capfd.readouterr().out
    shares = re.findall(r"([\d.]+)%$", printed, re.MULTILINE)
    assert len(shares) == len(demo.SHOWN)
    assert all(float(share) > 99.9 for share in shares)
    for label in (*demo.MODELS, *demo.WISE_FT, demo.STRONGER, "tune"):
        assert re.search(rf"^{label} +\d\.\d+ +\d\.\d+ ", printed, re.MULTILINE)
    back = [
        int(share)
        for share in re.findall(r"^Of what fine-tuning cost .* (\d+)% is back", printed, re.MULTILINE)
    ]
    automatic, stronger, tuned, wise_ft = back
    assert 0 < automatic < stronger < 100
    assert 0 < wise_ft < 100
    assert automatic < tuned
    assert (tmp_path / ".demo" / "demo.png").stat().st_size > 10_000
