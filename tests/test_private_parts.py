"""What is used of transformers and peft that they promise to nobody: one test for each.

Read in transformers 5.23 and peft 0.21. Where one of these fails after an upgrade, the file that it names has
to be read again; pyproject.toml bounds both versions.
"""

from __future__ import annotations

import inspect

import peft
import pytest
import torch
import transformers
from checkpoints import build_model
from mergekit.common import ModelReference
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from mergekit_monosoup import host


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("package", "allowed"), [(transformers, ">=5.1,<6"), (peft, ">=0.18,<0.22")])
def test_the_versions_that_were_read(package, allowed):
    assert Version(package.__version__) in SpecifierSet(allowed)
    from commands import ROOT

    assert f'"{package.__name__}{allowed}"' in (ROOT / "pyproject.toml").read_text()


def test_names_of_stored_tensors_are_converted_by_renamings_and_converters():
    """lora/placement.py and checkpoint/coverage.py."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    experts = get_checkpoint_conversion_mapping("mixtral")
    assert {type(step) for step in experts} <= {WeightConverter, WeightRenaming}
    converters = [step for step in experts if isinstance(step, WeightConverter)]
    assert all(step.source_patterns and step.target_patterns for step in converters)
    assert get_checkpoint_conversion_mapping("no such type") is None
    with torch.device("meta"):
        model = build_model("qwen3-tied")
    assert isinstance(get_model_conversion_mapping(model), list)
    name, pattern = rename_source_key("model.norm.weight", [], [], "model", {})
    assert (name, pattern) == ("model.norm.weight", None)


def test_models_are_built_without_initialising():
    """lora/hollow.py."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        torch.nn.init.ones_(weight := torch.zeros(2))
    assert not weight.any()
    torch.nn.init.ones_(weight)
    assert weight.all()


def test_the_wrappers_of_peft_hold_what_they_wrap():
    """lora/hollow.py, lora/fitting.py."""
    from peft.tuners.lora import layer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)
    assert issubclass(TrainableTokensWrapper, AuxiliaryTrainingWrapper)
    kinds = (layer.Linear, layer.Embedding, layer.Conv1d, layer.Conv2d, layer.Conv3d, layer.ParamWrapper)
    assert all(issubclass(kind, layer.LoraLayer) for kind in (*kinds, layer.MultiheadAttention))
    body = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = peft.get_peft_model(body, config).base_model.model
    assert type(model[0]) is layer.Linear
    assert model[0].get_base_layer() is model[0].base_layer
    assert model[0].lora_A["default"].weight.shape == (2, 4)
    assert model[0].scaling["default"] == 4
    assert isinstance(model[1], ModulesToSaveWrapper)
    assert {"default"} == set(model[1].modules_to_save)
    assert model[1].original_module.weight.shape == (2, 3)


def test_keys_of_patterns_are_matched_as_peft_matches_them():
    """lora/adapter.py."""
    from peft.utils.other import get_pattern_key

    assert get_pattern_key(["q_proj", "layers.1.v_proj"], "model.layers.1.v_proj") == "layers.1.v_proj"
    assert get_pattern_key(["v_proj$", "k"], "model.layers.1.q_proj") == "model.layers.1.q_proj"


def test_setting_a_state_dict_says_what_does_not_fit():
    """lora/hollow.py."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    assert {"adapter_name", "low_cpu_mem_usage"} <= set(parameters(peft.set_peft_model_state_dict))
    result = peft.set_peft_model_state_dict(model, {"base_model.model.1.lora_A.weight": torch.zeros(2, 4)})
    assert any("lora_A.default" in key for key in result.missing_keys)
    assert any(".1." in key for key in result.unexpected_keys)


def test_peft_says_of_which_tensors_an_adapter_has_no_value(tmp_path):
    """lora/by_peft.py reads this warning."""
    body = nn.Sequential(nn.Linear(4, 3))
    peft.get_peft_model(body, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    stored = load_file(file)
    save_file({key: t for key, t in stored.items() if "lora_A" in key}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"missing adapter keys while loading the checkpoint: \['base_model"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_variants_of_lora_are_tagged():
    """lora/variants.py: by peft since 0.19, and by their names before."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {"use_dora", "init_lora_weights", "use_rslora", "layer_replication"} <= names


def test_configurations_of_unknown_types_are_read_for_a_while_only(tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    (tmp_path / "config.json").write_text('{"model_type": "of_nobody", "width": 7}')
    with host.plain_configurations(["of_nobody", "llama", None, "of_nobody"]):
        assert transformers.AutoConfig.from_pretrained(tmp_path).width == 7
        assert CONFIG_MAPPING["llama"] is transformers.LlamaConfig
    assert "of_nobody" not in CONFIG_MAPPING
    assert "llama" in CONFIG_MAPPING


@pytest.mark.parametrize("name", ["/data/a+b", "/data/model@main", "plain"])
def test_folders_are_referred_to_whatever_their_names(name):
    reference = host.local_reference(name)
    assert (reference.model.path, reference.model.revision, reference.lora) == (name, None, None)
    assert str(ModelReference.model_validate(reference).model.path) == name
