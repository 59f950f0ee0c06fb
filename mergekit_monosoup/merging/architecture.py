"""Take tensors by the names in the files where mergekit's definition of an architecture does not fit.

mergekit 0.1.5 knows an architecture from its own list of weights, or infers one. Some lists do not
match what transformers writes (Whisper, BERT without a head, T5 1.0), some inferences fail or lose
tensors (CLIP, ViT, ConvNeXt). Checkpoints that hold the same tensors can be merged all the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergekit import merge_methods
from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    arch_info_for_config,
    get_architecture_info,
)
from mergekit.architecture.json_definitions import JsonLayerTemplates, JsonModuleArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_monosoup.checkpoint.classes import architecture_name, class_name
from mergekit_monosoup.checkpoint.coverage import misfit
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.layout import Layout, common_layout
from mergekit_monosoup.errors import InputError, MissingTensorError
from mergekit_monosoup.merging.opened import open_with_common_names
from mergekit_monosoup.methods.contract import UpdateMethod

LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_SMALL_FILES = ("preprocessor_config.json", "processor_config.json", "vocab.txt", "modules.json")


def fitting_architecture(
    config: MergeConfiguration,
    options: MergeOptions,
    checkpoints: Mapping[ModelReference, Checkpoint] | None = None,
) -> ModelArchitecture:
    """Return a definition by which mergekit plans the recipe so that no tensor of its inputs is left out.

    mergekit's own definition is used where it covers the checkpoints. Otherwise tensors are taken by name
    as `checkpoint/layout.py` says; every run of numbered parts of the model (`layers.0`, `layers.1`, ...)
    counts as a module with layers, for gradients. What is left out, new or kept has been said by the plan.

    Args:
        config, options: the recipe.
        checkpoints: its models as `open_with_common_names` returns them.

    Returns:
        The definition; its `architectures` name the class of the output where it is made of names.

    Raises:
        InputError: a config.json does not name the class of its model.
        MissingTensorError: a checkpoint lacks a tensor that its class needs.
    """
    if options.allow_crimes:
        return get_architecture_info(config, options)
    checkpoints = checkpoints or open_with_common_names(config)
    models = list(checkpoints.values())
    for model in models:
        architecture_name(model)
    first = models[0]
    own = _own_definition(config, options, checkpoints)
    if own.arch is not None and own.problem is None:
        return own.arch
    # Recipes of slices and modules speak of the parts of mergekit's definition.
    if config.slices or config.modules:
        if own.arch is None:
            raise InputError(f"{own.problem}; recipes of slices or modules need a definition")
        LOG.warning("%s", own.problem)
        return own.arch
    base = checkpoints[config.base_model] if config.base_model is not None else None
    configs = {m: m.config(trust_remote_code=options.trust_remote_code) for m in checkpoints}
    known = own.arch.all_weights(next(iter(configs.values()))) if own.arch is not None else []
    axes = {weight.name: weight.vocabulary_axis for weight in known}
    ours = isinstance(merge_methods.get(config.merge_method), UpdateMethod)
    layout = common_layout(models, base, axes, strict=not ours)
    if layout is not None:
        owner = next(model for model, checkpoint in checkpoints.items() if checkpoint is layout.owner)
        return _named_architecture(layout, configs[owner], own.arch)
    if own.fails or own.arch is None:
        raise MissingTensorError(
            f"{own.problem}; and the checkpoints do not hold the same tensors, so these cannot be taken "
            "by their names either. Save all of them with the same version of transformers first"
        )
    LOG.warning("%s (%s)", own.problem, first.name)
    return own.arch


@dataclass(frozen=True)
class _Definition:
    """mergekit's definition of an architecture, what does not fit, and whether mergekit would fail."""

    arch: ModelArchitecture | None
    problem: str | None = None
    fails: bool = False


def _own_definition(
    config: MergeConfiguration, options: MergeOptions, checkpoints: Mapping[ModelReference, Checkpoint]
) -> _Definition:
    models = list(checkpoints.values())
    label = class_name(models[0])
    if len({class_name(model) for model in models}) > 1:
        return _Definition(None, "the checkpoints are of different classes", True)
    configs = [m.config(trust_remote_code=options.trust_remote_code) for m in checkpoints]
    if any(model.renamed for model in models) and arch_info_for_config(configs[0]) is None:
        return _Definition(None, "mergekit would infer the architecture from the names in the files", True)
    try:
        arch = _without_optional_aliases(get_architecture_info(_without_adapters(config), options))
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        return _Definition(None, f"mergekit cannot infer the architecture {label} ({error})", True)
    trust = options.trust_remote_code
    asked = {c.name: arch.all_weights(m.config(trust_remote_code=trust)) for m, c in checkpoints.items()}
    found = misfit(asked, models, label)
    return _Definition(arch, *found) if found is not None else _Definition(arch)


def _without_adapters(config: MergeConfiguration) -> MergeConfiguration:
    """Return a recipe of the same checkpoints, of which mergekit can look at the files."""
    models = config.referenced_models()
    if not any(model.lora for model in models):
        return config
    bare = {model: model.model_copy(update={"lora": None}) for model in models}
    base = bare[config.base_model] if config.base_model is not None else None
    listed = [{"model": model} for model in dict.fromkeys(bare.values())]
    return MergeConfiguration.model_validate(
        {"merge_method": config.merge_method, "models": listed, "base_model": base}
    )


def _without_optional_aliases(arch: ModelArchitecture) -> ModelArchitecture:
    """Drop the aliases of optional weights, which mergekit 0.1.5 cannot plan (BERT's `position_ids`)."""

    def plain(weights: Iterable[WeightInfo]) -> list[WeightInfo]:
        return [w.model_copy(update={"aliases": None}) if w.optional else w for w in weights]

    modules = {}
    for name, module in arch.modules.items():
        part = module.architecture
        if isinstance(part, JsonModuleArchitecture):
            layers = JsonLayerTemplates(weights=plain(part.definition.layer_templates.weights))
            changed = {
                "pre_weights": plain(part.definition.pre_weights),
                "layer_templates": layers,
                "post_weights": plain(part.definition.post_weights),
            }
            definition = part.definition.model_copy(update=changed)
            part = part.model_copy(update={"definition": definition})
        modules[name] = module.model_copy(update={"architecture": part})
    return arch.model_copy(update={"modules": modules})


def _named_architecture(
    layout: Layout, config: PretrainedConfig, own: ModelArchitecture | None
) -> ModelArchitecture:
    """Return a definition made of the tensors' names."""
    modules: dict[str, dict[int, list[WeightInfo]]] = {}
    for weight in layout.weights:
        info = WeightInfo(
            name=weight.name,
            vocabulary_axis=weight.vocabulary_axis,
            optional=weight.optional,
            tied_names=weight.tied_names or None,
        )
        found = _LAYER.match(weight.name)
        prefix, index = (found[1], int(found[2])) if found else ("", -1)
        modules.setdefault(prefix, {}).setdefault(index, []).append(info)
    return ModelArchitecture(
        modules={
            prefix or "default": ModuleDefinition(
                architecture=_NamedTensors(layers=tuple(tuple(layers[i]) for i in sorted(layers)))
                if prefix
                else _NamedTensors(loose=tuple(layers[-1]))
            )
            for prefix, layers in modules.items()
        },
        architectures=[class_name(layout.owner)],
        model_type=config.model_type,
        tagalong_files=list(dict.fromkeys([*((own and own.tagalong_files) or ()), *_SMALL_FILES])),
        vocab_size_config_key=own.vocab_size_config_key if own else None,
    )


class _NamedTensors(ModuleArchitecture, BaseModel, frozen=True):
    """A part of a model, given by the names of its tensors: loose ones, or those of each layer."""

    loose: tuple[WeightInfo, ...] = ()
    layers: tuple[tuple[WeightInfo, ...], ...] = ()

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return list(self.loose)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return []

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        return list(self.layers[index])

    def num_layers_config_key(self) -> str:
        return ""

    def num_layers(self, config: PretrainedConfig) -> int:
        return len(self.layers)
