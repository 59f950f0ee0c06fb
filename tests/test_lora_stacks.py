"""How stacked experts of an adapter are packed: by the marker, by the values, or with a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapters import MOE_SIZES, make_adapter
from lora_edits import edit
from lora_merges import lora_warnings, write_base
from safetensors.torch import load_file
from test_lora_foreign_files import WEIGHTS, Tensors, passthrough, rewritten
from test_lora_no_copy import merged_by_peft

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.adapter import read_adapter
from mergekit_monosoup.lora.said import warn_once
from mergekit_monosoup.lora.stacks import layout_by_values

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    warn_once.cache_clear()


def _grouped(tensors: Tensors, experts: int = 4) -> Tensors:
    """B of stacks packed expert by expert."""
    return {
        key: t.reshape(t.shape[0], -1, experts).mT.reshape(t.shape)
        if ".experts." in key and "lora_B" in key
        else t
        for key, t in tensors.items()
    }


@pytest.mark.parametrize("kind", ["experts-qwen3", "experts-mixtral", "experts-patterns"])
def test_the_layout_marker_of_stacked_experts_is_obeyed(kind, tmp_path, caplog):
    base = write_base(kind, tmp_path / "base")
    adapter = make_adapter(kind, tmp_path / "adapter")
    assert any(".experts." in key for key in load_file(adapter / WEIGHTS))
    marked = {"rank_major": lambda tensors: tensors, "grouped_by_expert": _grouped}
    want = merged_by_peft(kind, adapter, "bfloat16")
    for layout, change in marked.items():
        other = rewritten(adapter, tmp_path / layout, change, lora_B_layout=layout)
        with caplog.at_level("WARNING"):
            tensors = passthrough(tmp_path, base, other, f"out-{layout}")
        assert all(torch.equal(tensors[n], want[n]) for n in tensors), layout
        assert read_adapter(str(other)).settings["lora_B_layout"] == "rank_major"
    assert lora_warnings(caplog) == []


def test_an_unknown_layout_is_refused(tmp_path):
    adapter = make_adapter("experts-qwen3", tmp_path / "adapter")
    strange = rewritten(adapter, tmp_path / "strange", lambda t: t, lora_B_layout="by_rows")
    with pytest.raises(AdapterError, match="by_rows"):
        read_adapter(str(strange))


def test_values_that_show_nothing_are_read_as_peft_does_with_a_warning(tmp_path, caplog):
    adapter = make_adapter("experts-qwen3", tmp_path / "adapter")
    with caplog.at_level("WARNING"):
        found = read_adapter(str(adapter))
        read_adapter(str(adapter))
    (message,) = lora_warnings(caplog)
    assert "do not show how they are packed" in message
    assert '"lora_B_layout": "grouped_by_expert"' in message
    plain = load_file(adapter / WEIGHTS)
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in plain.items())


def test_of_one_direction_an_expert_both_packings_are_the_same(tmp_path, caplog):
    adapter = make_adapter("experts-qwen3", tmp_path / "adapter", r=1)
    with caplog.at_level("WARNING"):
        read_adapter(str(adapter))
    assert lora_warnings(caplog) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Tensors]:
    """A base, an adapter on its experts after some steps of real training, and what peft merges."""
    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        sizes = MOE_SIZES | {"num_experts": 8, "moe_intermediate_size": 24}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).float()
        model.save_pretrained(folder / "base")
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=experts)
        adapted = peft.get_peft_model(model, config)
        optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(25):
            tokens = torch.randint(0, 96, (8, 24), generator=generator)
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        adapted.save_pretrained(folder / "adapter")
        merged = adapted.merge_and_unload().state_dict()
    return folder / "base", folder / "adapter", {n: t.clone() for n, t in merged.items()}


@pytest.mark.parametrize("grouped", [False, True])
def test_trained_stacks_show_how_they_are_packed(grouped, trained, tmp_path, caplog):
    """Trained expert by expert, B has the same columns in the other order: Adam works entry by entry."""
    base, adapter, want = trained
    change = (lambda tensors: _grouped(tensors, 8)) if grouped else (lambda tensors: tensors)
    other = rewritten(adapter, tmp_path / "other", change)
    assert "lora_B_layout" not in json.loads((other / "adapter_config.json").read_text())
    with caplog.at_level("WARNING"):
        tensors = passthrough(tmp_path, base, other)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)
    messages = lora_warnings(caplog)
    assert len(messages) == grouped
    assert all("packed expert by expert" in m and '"lora_B_layout": "rank_major"' in m for m in messages)


def test_the_edited_adapter_is_packed_as_peft_loads_it_and_says_so(trained, tmp_path):
    _, adapter, _ = trained
    other = rewritten(adapter, tmp_path / "other", lambda tensors: _grouped(tensors, 8))
    edit(other, tmp_path / "edited", "--mixing", "uniform")
    edit(adapter, tmp_path / "plain", "--mixing", "uniform")
    got, want = (load_file(tmp_path / name / WEIGHTS) for name in ("edited", "plain"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "edited" / "adapter_config.json").read_text())
    assert settings["lora_B_layout"] == "rank_major"


def test_the_marker_goes_before_the_values(trained, tmp_path, caplog):
    _, adapter, _ = trained
    other = rewritten(adapter, tmp_path / "other", lambda t: t, lora_B_layout="grouped_by_expert")
    with caplog.at_level("WARNING"):
        found = read_adapter(str(other)).tensors
    assert lora_warnings(caplog) == []
    stored = load_file(adapter / WEIGHTS)
    assert any(not torch.equal(found[key], tensor) for key, tensor in stored.items())


def test_columns_without_structure_speak_for_no_packing():
    generator = torch.Generator().manual_seed(0)
    for experts, rank, rows in [(2, 2, 16), (4, 8, 32), (8, 3, 64), (64, 16, 24)]:
        stacks = [(torch.randn(rows, experts * rank, generator=generator), experts) for _ in range(3)]
        assert layout_by_values(stacks) is None
        # A direction that all columns share says nothing either.
        shared = torch.randn(rows, 1, generator=generator)
        assert layout_by_values([(b + 3 * shared, e) for b, e in stacks]) is None
    assert layout_by_values([(torch.zeros(8, 8), 4)]) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_one_adapter_copied_to_all_experts_speaks_for_no_packing(grouped):
    one = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    copies = one.repeat(1, 8) if grouped else one.repeat_interleave(8, 1)
    assert layout_by_values([(copies, 8)] * 3) is None
