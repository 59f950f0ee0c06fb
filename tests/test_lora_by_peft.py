"""What peft merges itself: whatever the names in the file, all of the adapter or a refusal."""

from __future__ import annotations

import pytest
import torch
from adapters import make_adapter
from lora_merges import merge, recipe, write_base
from mergekit.common import ModelReference
from safetensors.torch import load_file
from test_lora_foreign_files import _renamed, passthrough, rewritten
from test_lora_stacks import _grouped

from mergekit_monosoup.lora.by_peft import with_peft_names

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


@pytest.fixture(scope="module")
def dora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    base = write_base("plain", folder / "base")
    return base, make_adapter("plain", folder / "adapter", use_dora=True)


@pytest.mark.parametrize(
    "change",
    [
        _renamed(
            *((f"{part}.", f"{part}.default.") for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
        ),
        _renamed(("base_model.model.", "base_model.model.base_model.model.")),
        _renamed(("base_model.model.", "base_model.model._orig_mod.")),
    ],
    ids=["default", "twice", "compiled"],
)
def test_names_are_seen_through_before_peft_merges(change, dora, tmp_path):
    base, adapter = dora
    want = passthrough(tmp_path, base, adapter, "want")
    got = passthrough(tmp_path, base, rewritten(adapter, tmp_path / "other", change))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_adapter_that_peft_would_merge_in_part_is_refused(dora, tmp_path):
    base, adapter = dora
    other = rewritten(adapter, tmp_path / "other", _renamed(("model.layers.0.", "model.blocks.0.")))
    result = merge(tmp_path, recipe(base, f"{base}+{other}", parameters={"exact_lora": False}))
    assert result.exit_code == 1
    assert "is not of base" in result.output
    assert "layers.0" in result.output
    assert not (tmp_path / "out").exists()


def test_peft_is_handed_stacks_as_it_packs_them(tmp_path):
    base = write_base("experts-qwen3", tmp_path / "base")
    adapter = make_adapter("experts-qwen3", tmp_path / "adapter")
    other = rewritten(adapter, tmp_path / "other", _grouped, lora_B_layout="grouped_by_expert")
    reference = with_peft_names(ModelReference.parse(f"{base}+{other}"), tmp_path / "copy")
    assert reference.lora.path == str(tmp_path / "copy")
    copied, want = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "copy", adapter))
    assert copied.keys() == want.keys()
    assert all(torch.equal(copied[key], want[key]) for key in want)
    as_it_is = ModelReference.parse(f"{base}+{adapter}")
    assert with_peft_names(as_it_is, tmp_path / "none") is as_it_is
    assert not (tmp_path / "none").exists()
