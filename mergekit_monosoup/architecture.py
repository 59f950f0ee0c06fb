"""Take tensors by the names in the files where mergekit's definition of an architecture does not fit.

mergekit 0.1.5 knows an architecture from its own list of weights, or infers one. Some lists do not
match what transformers writes (Whisper, BERT without a head, T5 1.0), some inferences fail or lose
tensors (CLIP, ViT, ConvNeXt). Checkpoints that hold the same tensors can be merged all the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
    get_architecture_info,
)
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_monosoup.coverage import (
    canonical_names,
    check_coverage,
    describe,
    tensor_names,
)
from mergekit_monosoup.errors import InputError, MissingTensorError
from mergekit_monosoup.float8 import is_scale

LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_SMALL_FILES = ("preprocessor_config.json", "processor_config.json", "vocab.txt", "modules.json")


@contextmanager
def fitting_architecture(config: MergeConfiguration, options: MergeOptions) -> Iterator[None]:
    """Within this context, mergekit plans the recipe so that no tensor of its inputs is left out.

    mergekit's own definition is used where it covers the checkpoints. Otherwise, and where all
    checkpoints hold the same tensors, these are taken by name; every run of numbered parts of the
    model (`layers.0`, `layers.1`, ...) counts as a module with layers, for gradients.

    Raises:
        InputError: a config.json does not name the class of its model.
        MissingTensorError: neither way gets all tensors through.
    """
    models = config.referenced_models()
    LoaderCache().setup(options=options)
    configs = {model: model.config(trust_remote_code=options.trust_remote_code) for model in models}
    classes = {model: _class_name(model, config) for model, config in configs.items()}
    arch, problem = _own_architecture(config, options, configs)
    if problem is None:
        yield
        return
    named = _named_architecture(models, configs, arch)
    if named is None:
        raise MissingTensorError(
            f"{problem}; and the checkpoints do not hold the same tensors, so these cannot be taken by "
            "their names either. Save all of them with the same version of transformers first"
        )
    LOG.warning("%s; tensors are taken by their names in the files instead", problem)
    before = {name: NAME_TO_ARCH.get(name) for name in classes.values()}
    NAME_TO_ARCH.update({name: [named] for name in before})
    try:
        yield
    finally:
        for name, definitions in before.items():
            if definitions is None:
                del NAME_TO_ARCH[name]
            else:
                NAME_TO_ARCH[name] = definitions


def _class_name(model: ModelReference, config: PretrainedConfig) -> str:
    if not config.architectures or len(config.architectures) != 1:
        raise InputError(
            f"config.json of {model} names {config.architectures or 'no class'} under architectures; "
            "mergekit needs exactly one, such as the class that the checkpoint was saved from"
        )
    name: str = config.architectures[0]
    return name


def _own_architecture(
    config: MergeConfiguration, options: MergeOptions, configs: dict[ModelReference, PretrainedConfig]
) -> tuple[ModelArchitecture | None, str | None]:
    """Return mergekit's definition, and why it does not fit, or None where it does."""
    label = _class_name(*next(iter(configs.items())))
    try:
        arch = get_architecture_info(config, options)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        return None, f"mergekit cannot infer the architecture {label} ({error})"
    for model, model_config in configs.items():
        weights = arch.all_weights(model_config)
        if any(w.optional and w.aliases for w in weights):
            return arch, f"mergekit cannot plan the optional weights with aliases of {label}"
        found = check_coverage(weights, tensor_names(model), model_config.model_type)
        if found.lost:
            return arch, f"mergekit's definition of {label} leaves out {describe(found.lost)} of {model}"
        if found.absent:
            return arch, f"mergekit's definition of {label} asks for {describe(found.absent)}, not in {model}"
    return arch, None


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
