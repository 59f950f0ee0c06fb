"""`make demo`, with a training that is too short to learn anything."""

from __future__ import annotations

import functools
import importlib
import re

import pytest
import torch
from commands import ROOT, installed


@pytest.fixture
def example(monkeypatch):
    """example(name): a module of the examples folder."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def test_token_ids_are_bytes(example):
    tokenizer = example("small_models").build_tokenizer()
    text = "W = W₀ + α·ΔW\n"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == example("small_models").END


def test_held_out_text_is_not_trained_on(example):
    models = example("small_models")
    for corpus in (models.english(), models.code()):
        assert corpus.train.max() < 256
        train, held_out = (bytes(part.tolist()) for part in corpus)
        middle = len(held_out) // 2
        assert held_out[middle : middle + 400] not in train


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="the stock command must know the method")
def test_demo(example, monkeypatch, tmp_path, capfd):
    demo = example("demo")
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "write_pair", functools.partial(demo.write_pair, steps=(3, 2)))
    monkeypatch.chdir(tmp_path)
    try:
        demo.main()
    finally:
        torch.set_num_threads(threads)
    printed = capfd.readouterr().out
    shares = re.findall(r"([\d.]+)%$", printed, re.MULTILINE)
    assert len(shares) == len(demo.SHOWN)
    assert all(float(share) > 99.9 for share in shares)
    assert re.search(r"^merged +\d\.\d+ +\d\.\d+$", printed, re.MULTILINE)
