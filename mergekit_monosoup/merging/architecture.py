"""Take tensors by the names in the files where mergekit's definition of an architecture does not fit.

mergekit 0.1.5 knows an architecture from its own list of weights, or infers one. Some lists do not
match what transformers writes (Whisper, BERT without a head, T5 1.0), some inferences fail or lose
tensors (CLIP, ViT, ConvNeXt). Checkpoints that hold the same tensors can be merged all the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    get_architecture_info,
)
from mergekit.architecture.json_definitions import JsonLayerTemplates, JsonModuleArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_monosoup.checkpoint.coverage import (
    canonical_names,
    check_coverage,
    describe,
    tensor_names,
)
from mergekit_monosoup.checkpoint.scales import is_scale
from mergekit_monosoup.errors import InputError, MissingTensorError

LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_SMALL_FILES = ("preprocessor_config.json", "processor_config.json", "vocab.txt", "modules.json")


def fitting_architecture(config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Return a definition by which mergekit plans the recipe so that no tensor of its inputs is left out.

    mergekit's own definition is used where it covers the checkpoints. Otherwise, and where all
    checkpoints hold the same tensors, these are taken by name; every run of numbered parts of the
    model (`layers.0`, `layers.1`, ...) counts as a module with layers, for gradients. Tensors that are
    left out all the same are named in a warning.

    Raises:
        InputError: a config.json does not name the class of its model.
        MissingTensorError: mergekit would fail, and the checkpoints do not hold the same tensors.
    """
    if options.allow_crimes:
        return get_architecture_info(config, options)
    models = config.referenced_models()
    configs = {model: model.config(trust_remote_code=options.trust_remote_code) for model in models}
    for model, its_config in configs.items():
        _class_name(model, its_config)
    own = _own_definition(config, options, configs)
    # Recipes of slices and modules speak of the parts of mergekit's definition.
    by_name = own.problem is not None and not (config.slices or config.modules)
    named = _named_architecture(models, configs, own.arch) if by_name else None
    if named is not None:
        LOG.warning("%s; tensors are taken by their names in the files instead", own.problem)
        return named
    if own.problem is not None:
        if own.fails and by_name:
            raise MissingTensorError(
                f"{own.problem}; and the checkpoints do not hold the same tensors, so these cannot be taken "
                "by their names either. Save all of them with the same version of transformers first"
            )
        if own.arch is None:
            raise InputError(f"{own.problem}; recipes of slices or modules need a definition")
        LOG.warning("%s", own.problem)
    if own.arch is None:
        raise InputError(f"mergekit has no definition of {_class_name(*next(iter(configs.items())))}")
    return own.arch


def _class_name(model: ModelReference, config: PretrainedConfig) -> str:
    if not config.architectures or len(config.architectures) != 1:
        raise InputError(
            f"config.json of {model} names {config.architectures or 'no class'} under architectures; "
            "mergekit needs exactly one, such as the class that the checkpoint was saved from"
        )
    name: str = config.architectures[0]
    return name


@dataclass(frozen=True)
class _Definition:
    """mergekit's definition of an architecture, what does not fit, and whether mergekit would fail."""

    arch: ModelArchitecture | None
    problem: str | None = None
    fails: bool = False


def _own_definition(
    config: MergeConfiguration, options: MergeOptions, configs: dict[ModelReference, PretrainedConfig]
) -> _Definition:
    label = _class_name(*next(iter(configs.items())))
    try:
        arch = _without_optional_aliases(get_architecture_info(_without_adapters(config), options))
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        return _Definition(None, f"mergekit cannot infer the architecture {label} ({error})", True)
    lost = None
    for model, model_config in configs.items():
        weights = arch.all_weights(model_config)
        found = check_coverage(weights, tensor_names(model), model_config.model_type)
        if found.absent:
            problem = f"mergekit's definition of {label} asks for {describe(found.absent)}, not in {model}"
            return _Definition(arch, problem, True)
        if found.lost and lost is None:
            lost = f"mergekit's definition of {label} leaves out {describe(found.lost)} of {model}"
    return _Definition(arch, lost)


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
    models: Sequence[ModelReference],
    configs: dict[ModelReference, PretrainedConfig],
    own: ModelArchitecture | None,
) -> ModelArchitecture | None:
    """Return a definition made of the tensor names, or None where the checkpoints differ in them."""
    first = models[0]
    names = []
    for model in models:
        held = dict.fromkeys(tensor_names(model))
        weights = [name for name in held if not is_scale(name, held)]
        names.append(canonical_names(weights, configs[model].model_type))
    if any(set(other) != set(names[0]) for other in names[1:]):
        return None
    axes = {w.name: w.vocabulary_axis for w in own.all_weights(configs[first])} if own else {}
    modules: dict[str, dict[int, list[WeightInfo]]] = {}
    for canonical, name in names[0].items():
        aliases = tuple({other[canonical] for other in names[1:]} - {name})
        weight = WeightInfo(name=name, aliases=aliases or None, vocabulary_axis=axes.get(name))
        found = _LAYER.match(name)
        prefix, index = (found[1], int(found[2])) if found else ("", -1)
        modules.setdefault(prefix, {}).setdefault(index, []).append(weight)
    config = configs[first]
    return ModelArchitecture(
        modules={
            prefix or "default": ModuleDefinition(
                architecture=_NamedTensors(layers=tuple(tuple(layers[i]) for i in sorted(layers)))
                if prefix
                else _NamedTensors(loose=tuple(layers[-1]))
            )
            for prefix, layers in modules.items()
        },
        architectures=[_class_name(first, config)],
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
