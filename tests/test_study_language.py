"""The language track of the study: its text, its measure, its training, on far fewer steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.robustness import language, text
from benchmarks.robustness.demo_pair import excerpts
from benchmarks.robustness.sources import Document, docstrings, is_prose, strip_docstrings
from benchmarks.robustness.track import Recipe

FULL_RECIPE = Recipe("M-0", 1e-3, "cosine", 2)
LORA_RECIPE = Recipe("LoRA", 1e-3, "cosine", 2, lora_rank=2)
SOURCE = '''"""A module.

It says more.
"""

def double(x):
    """Return twice x."""
    return 2 * x  # "quotes"
'''


@pytest.fixture(scope="module")
def track():
    """The short track with two steps of pre-training."""
    track = language.LanguageTrack(short=True)
    track.size = replace(track.size, pretraining=replace(track.size.pretraining, steps=2), windows=8)
    return track


@pytest.fixture(scope="module")
def base(track, tmp_path_factory):
    out = tmp_path_factory.mktemp("language") / "base"
    track.pretrain(out, lambda step, steps, loss: None)
    return out


def trained(track, base, recipe, seed, out):
    seen = []
    track.finetune(base, recipe, seed, out, lambda *told: seen.append(told))
    assert [(step, steps) for step, steps, _ in seen] == [(1, 2), (2, 2)]
    (file,) = out.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("domain", ["licences", "tables"])
def test_splits_have_no_paragraph_in_common(domain):
    texts = text.corpus(domain).splits.values()
    keys = [
        {
            text.normalised(paragraph) or paragraph
            for document in split.decode().split("\0")
            for paragraph in text.paragraphs(document)
        }
        for split in texts
    ]
    assert all(keys)
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_documents_and_paragraphs_are_split_once():
    repeated = "The licence, in every file:\n(c) 20{}."
    documents = [
        Document(f"file {i}", f"{repeated.format(i)}\n\nBody {'abc'[i % 3]} {'x' * i}") for i in range(60)
    ]
    splits = text._split(documents)
    assert splits == text._split(reversed(documents))
    assert b"".join(splits.values()).count(b"in every file") == 1
    assert b"in every file" in splits["train"]
    for document in documents:
        body = document.text.split("\n\n")[1].encode()
        holders = [
            name for name, split in splits.items() if body in split.replace(b"\0", b"\n\n").split(b"\n\n")
        ]
        assert holders == [text.split_of(document.name)]


def test_text_is_the_same_in_every_reading():
    before = text.corpus("tables").card()
    text.corpus.cache_clear()
    assert text.corpus("tables").card() == before


def test_a_domain_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setitem(text._READERS, "tables", lambda: ([Document("one", "1,2")], ("nothing 1.0",)))
    text.corpus.cache_clear()
    with pytest.raises(text.CorpusError, match=r"'tables': .* nothing 1\.0: install scikit-learn"):
        text.corpus("tables")
    text.corpus.cache_clear()


def test_prose_is_told_from_code():
    assert docstrings(SOURCE) == ["A module.\n\nIt says more.", "Return twice x."]
    assert strip_docstrings(SOURCE).split() == ["def", "double(x):", "return", "2", "*", "x", "#", '"quotes"']
    assert is_prose("This sentence is long enough to be taken for a paragraph of English, and so it is one.")
    assert not is_prose("def f(x): return {'key': x[0] * 2, 'other': x[1] ** 3}  # " + "sentence " * 3 + ".")
    assert not is_prose("Short.")


def test_token_ids_are_bytes():
    tokenizer = language.build_tokenizer()
    sentence = "W = W₀ + α·ΔW Ā\n"
    assert tokenizer(sentence).input_ids == list(sentence.encode())
    assert tokenizer.decode(list(sentence.encode())) == sentence
    assert tokenizer.decode(list(range(1, 128))) == "".join(map(chr, range(1, 128)))
    assert len(tokenizer) == 256
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == language.END_ID == text.END_OF_DOCUMENT[0]


def test_bits_per_byte_is_the_mean_cost():
    torch.manual_seed(0)
    model = language.build_model().eval()
    windows = torch.randint(1, 256, (3, 16))
    with torch.no_grad():
        probabilities = model(input_ids=windows).logits.double().softmax(-1)
    costs = [
        -math.log2(probabilities[row, i, windows[row, i + 1]].item()) for row in range(3) for i in range(15)
    ]
    assert language.bits_per_byte(model, windows) == pytest.approx(sum(costs) / 45, rel=1e-5)


def test_windows_do_not_overlap():
    windows = language.evenly_spaced(bytes(range(256)) * 8, 16)
    assert windows.shape == (16, language.CONTEXT)
    assert torch.equal(windows.flatten(), torch.arange(256).repeat(8))
    assert language.evenly_spaced(bytes(4096), 3).shape == (3, language.CONTEXT)


def test_pretraining_follows_its_seed(track, base, tmp_path):
    track.pretrain(tmp_path, lambda step, steps, loss: None)
    first, second = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(weight.dtype == torch.float32 for weight in first.values())
    assert 1_600_000 < sum(weight.numel() for weight in first.values()) < 2_100_000


def test_finetuning_follows_its_seed(track, base, tmp_path):
    first = trained(track, base, FULL_RECIPE, 1, tmp_path / "a")
    again = trained(track, base, FULL_RECIPE, 1, tmp_path / "b")
    other = trained(track, base, FULL_RECIPE, 2, tmp_path / "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_scores_and_activations_have_what_the_contract_asks(track, base):
    scores = track.scores(base)
    assert list(scores) == [track.validation, track.in_distribution, *track.shifts]
    assert all(0 < value < 12 for value in scores.values())
    assert track.scores(base) == scores
    outputs = track.activations(base)
    assert set(outputs) == {"id", "ood"}
    for blocks in outputs.values():
        assert len(blocks) == 6
        assert all(block.dtype == torch.float64 and block.shape[1] == 160 for block in blocks)


def test_adapter_loads_in_peft(track, base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    factors = trained(track, base, LORA_RECIPE, 0, tmp_path)
    assert len(factors) == 2 * 6 * len(language.LORA_LAYERS)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        after = PeftModel.from_pretrained(model, tmp_path)(input_ids=tokens).logits
    assert not torch.equal(before, after)


def test_recipes_are_three_and_an_adapter():
    track = language.LanguageTrack(short=False)
    assert [recipe.name for recipe in track.recipes] == ["M-1", "M-2", "M-3", "LoRA"]
    assert [recipe.lora_rank for recipe in track.recipes] == [None, None, None, 8]
    assert len(track.seeds) == 3
    assert sum(language.MIXTURE.values()) == pytest.approx(1)


def test_excerpts_are_whole_lines_of_every_document():
    documents = b"\0".join([b"first\nsecond", b"a long line\n" * 9, b"last"])
    assert excerpts(documents, 30, 30) == b"first\nsecond\n\na long line\na long line\n"
    assert excerpts(documents, 38, 30) == b"first\nsecond\n\na long line\na long line\n\nlast\n"
    assert excerpts(documents, 75, 30) == b"first\nsecond\n\n" + b"a long line\n" * 5 + b"\nlast\n"
    assert excerpts(documents, 5, 30) == b"first\nsecond\n"
    assert excerpts(b"one\nby a.b@c.org\ntwo", 100, 30) == b"one\ntwo\n"
