"""What is used of mergekit's internals, as read in version 0.1.5: one test for each touch of `host`."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch
from checkpoints import load_tensors
from commands import recipe
from mergekit import merge as mergekit_merge
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.methods.merge import Merge

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

READ_IN = "0.1.5"


def test_the_version_that_was_read():
    """Another release of mergekit: read what host.py uses of it again, then move this."""
    assert version("mergekit") == READ_IN


@pytest.fixture
def opened(family):
    models = family("qwen3-tied", "bf16")
    config = MergeConfiguration.model_validate(recipe(models.base, models.tuned[0], out_dtype="float32"))
    options = MergeOptions()
    host.open_models(config.referenced_models(), options)
    return models, config, options


def planned(config, options):
    arch = fitting_architecture(config, options)
    return host.plan_tasks(config, arch, options, host.out_config(config, arch, False))


def test_planned_tasks_name_every_tensor_and_its_dtype(opened):
    models, config, options = opened
    tasks, tokenizer = planned(config, options)
    assert tokenizer is None
    assert {task.name for task in tasks} == set(load_tensors(models.base))
    assert {task.dtype for task in tasks} == {torch.float32}


def test_a_task_is_run_with_what_it_depends_on_or_is_given(opened):
    models, config, options = opened
    task = next(t for t in planned(config, options)[0] if t.name.endswith("input_layernorm.weight"))
    alone = host.run_task(task.task)
    loaded = {part: part.execute() for part in host.inputs_of(task.task)}
    assert {str(part.model) for part in loaded} == {str(models.base), str(models.tuned[0])}
    assert torch.equal(host.run_task(task.task, loaded=loaded), alone)
    given = {part: torch.zeros_like(tensor) for part, tensor in loaded.items()}
    assert not host.run_task(task.task, loaded=given).any()


def test_a_method_is_handed_further_arguments(opened):
    from mergekit.merge_methods import get

    _, config, options = opened
    task = next(t for t in planned(config, options)[0] if t.name.endswith("down_proj.weight"))
    seen = []
    merge = Merge(on_outcome=[seen.append])
    assert get("monosoup").spec.name == "monosoup"
    host.run_task(host.with_parameters(task.task, merge=merge))
    assert [outcome.action for outcome in seen] == ["edited"]


def test_names_and_loaders_are_those_of_the_cache(opened):
    models, config, _ = opened
    name = "model.embed_tokens.weight"
    task = LoadTensor(model=config.base_model, tensor="absent", aliases=(name,))
    assert host.stored_name(task) == name
    assert host.loader_of(config.base_model) is LoaderCache.loaders[config.base_model]
    assert host.folder_of(config.base_model) == str(models.base)


def test_private_functions_of_merge_take_what_they_took():
    taken = {
        "_model_out_config": ["merge_config", "arch_info", "trust_remote_code"],
        "_set_chat_template": ["tokenizer", "merge_config", "trust_remote_code"],
    }
    for name, parameters in taken.items():
        found = list(inspect.signature(getattr(mergekit_merge, name)).parameters)
        assert found == parameters or found == ["config", *parameters[1:]], name


def test_the_loader_of_files_by_name(tmp_path, family):
    folder = family("qwen3-tied", "bf16").base
    loader = host.raw_loader(str(folder / "model.safetensors"))
    assert set(loader.index.tensor_paths) == set(load_tensors(folder))
