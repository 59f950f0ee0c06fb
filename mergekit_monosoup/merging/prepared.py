"""A recipe whose inputs are open and whose output is laid out: what every process of a run begins with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.dequantised import has_scales
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.lineage import check_base
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.lora.exact import same_base
from mergekit_monosoup.merging.architecture import fitting_architecture
from mergekit_monosoup.merging.layout import Layout, plan_layout
from mergekit_monosoup.merging.opened import described_by, finetuned_models, open_with_common_names
from mergekit_monosoup.merging.units import PlannedUnits, plan_units
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.registry import stock
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.spectral.parts import PartsStore

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The units of a recipe, the layout of its output, and what its tensors share.

    `described_by` is the checkpoint whose configuration the output has.
    """

    config: MergeConfiguration
    models: Sequence[ModelReference]
    arch: ModelArchitecture
    out_config: Any
    merge: Merge
    units: PlannedUnits
    layout: Layout
    described_by: ModelReference

    @classmethod
    def of(
        cls,
        config: MergeConfiguration,
        options: MergeOptions,
        on_record: Sequence[Callable[[TensorRecord], None]],
        parts: PartsStore | None = None,
    ) -> Prepared:
        """Plan a recipe whose models mergekit has opened.

        Args:
            config: the recipe.
            options: mergekit's own.
            on_record: who hears of each tensor.
            parts: keeps the parts of updates from merge to merge.

        Raises:
            InputError: the checkpoints do not go together.
        """
        config = _with_common_dtype(config)
        models = config.referenced_models()
        merge = Merge(config.base_model, finetuned_models(config), on_record=on_record, parts=parts)
        checkpoints = open_with_common_names(config, as_stored=options.allow_crimes)
        arch = fitting_architecture(config, options, checkpoints)
        out_config = host.out_config(config, arch, options.trust_remote_code)
        with stock().suspended():
            # mergekit's planner brings a recipe into another form, in which it cannot be planned again.
            copy = config.model_copy(deep=True)
            units = plan_units(copy, arch, options, out_config, merge, checkpoints)
        layout = plan_layout(
            ((u.name, u.shape, str(u.dtype).removeprefix("torch.")) for u in units.units),
            options.out_shard_size,
        )
        return cls(config, models, arch, out_config, merge, units, layout, described_by(checkpoints, config))


def _with_common_dtype(config: MergeConfiguration) -> MergeConfiguration:
    """Set `dtype` where some checkpoints are float8 and others are not: these have no common dtype."""
    held = [LoaderCache().get(model).index.tensor_paths for model in config.referenced_models()]
    float8 = {has_scales(names) for names in held}
    if config.dtype is not None or len(float8) == 1:
        return config
    LOG.warning("some checkpoints are stored as float8 and others are not: merging with dtype: bfloat16")
    return config.model_copy(update={"dtype": "bfloat16"})


def check_bases(config: MergeConfiguration, checkpoints: Mapping[ModelReference, Checkpoint]) -> None:
    """Look at sampled values of all checkpoints of a recipe, which mergekit has opened by now.

    Raises:
        InputError: the base may not be the base.
    """
    base = config.base_model
    for model in finetuned_models(config) if base is not None else ():
        if model.lora is not None and same_base(model, base):
            continue
        message = check_base(checkpoints[base], checkpoints[model])
        if message is not None:
            raise InputError(f"{message}, or pass --force-base to merge all the same")
