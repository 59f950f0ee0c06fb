"""The merge method `model_stock_stable`."""

from __future__ import annotations

import logging
from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from torch import Tensor

from mergekit_monosoup.alignment.average import towards_average
from mergekit_monosoup.alignment.inner import inner_products
from mergekit_monosoup.alignment.stock import Angle, model_stock_ratio
from mergekit_monosoup.errors import ConfigurationError, NonFiniteError
from mergekit_monosoup.methods.adapters import EXACT_LORA, with_exact_weights
from mergekit_monosoup.methods.contract import REPORT, ROUNDING, UpdateMethod, specification
from mergekit_monosoup.methods.inputs import GroupInputs, is_whole_recipe
from mergekit_monosoup.methods.merge import Merge
from mergekit_monosoup.methods.outcomes import MergedWeight
from mergekit_monosoup.methods.parameters import choice, flag
from mergekit_monosoup.spectral.matrix import choose_view

LOG = logging.getLogger(__name__)

_SPEC = specification(
    name="model_stock_stable",
    pretty_name="Model Stock, stable at any precision",
    reference_url="https://arxiv.org/abs/2403.19522",
    parameters=(
        ParameterSpec(
            "angle",
            choice("angle", Angle),
            ParameterScope.SHARED,
            default="mean_angle",
            description="mean_angle or mean_cosine: how more than two checkpoints' pairs are averaged",
        ),
        ParameterSpec(
            "filter_wise",
            flag("filter_wise"),
            ParameterScope.SHARED,
            default=False,
            description="true: one ratio per output row or filter instead of one per tensor",
        ),
        ParameterSpec(
            "bounded",
            flag("bounded"),
            ParameterScope.SHARED,
            default=True,
            description="keep the ratio in [0, 1]; false: the raw formula",
        ),
        EXACT_LORA,
        ROUNDING,
        REPORT,
    ),
)


class ModelStock(UpdateMethod):
    """Draw the average of N >= 2 checkpoints towards the base: W = t mean(W_i) + (1 - t) W0.

    t = N c / (1 + (N - 1) c) with c from the angles between the updates (arXiv 2403.19522). Works in
    float32 (float64 for float64) at any magnitude of the updates, and rounds once.
    """

    spec = _SPEC
    fewest_finetuned = 2

    def validate_inputs(self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None) -> None:
        """Refuse a recipe without base or with fewer than two fine-tuned models, or quantised."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        # An optional tensor may be in one fine-tuned checkpoint only.
        if is_whole_recipe(group_name) and len(input_ids) <= self.fewest_finetuned:
            raise ConfigurationError(
                f"merge method {self.spec.name!r} measures the angle between fine-tuned checkpoints "
                "and needs at least two besides base_model; for a single one use monosoup"
            )

    def merged(
        self,
        stored: GroupInputs,
        merge: Merge,
        started: float,
        /,
        *,
        angle: Angle,
        filter_wise: bool,
        bounded: bool,
        exact_lora: bool,
        report: str | None,
    ) -> Tensor:
        """Return the merged weight.

        An optional tensor that only one fine-tuned checkpoint has keeps the base's value: there is
        no angle to measure.

        Raises:
            InputError: a tensor holds NaN or infinity.
        """
        inputs = with_exact_weights(stored, merge) if exact_lora else stored
        base, finetuned = inputs.stored_base, inputs.stored_tuned
        if len(finetuned) < 2:
            only = stored.group.non_base[0].id
            LOG.warning(
                "%s: only %s has it besides the base, so there is no angle to measure; it keeps "
                "the base's value",
                inputs.label,
                only,
            )
            alone = MergedWeight(inputs.checked(base), "kept", f"only {only} has it: the base's value")
            merge.record(stored.group, self.spec, alone, report=report, started=started)
            return alone.weight
        view = choose_view(tuple(base.shape), stored.group.metadata.name)
        rows = view.shape[0] * view.shape[1] if filter_wise and view.decomposes else 1
        try:
            cosines = inner_products(base, finetuned, rows=rows).cosines
            t = model_stock_ratio(cosines, angle=angle, bounded=bounded)
            result = towards_average(base, finetuned, t, inputs.storage)
        except NonFiniteError:
            inputs.require_finite()
            raise inputs.overflow() from None
        merged = MergedWeight(
            inputs.checked(result),
            "averaged",
            _in_words(t),
            update_norm=inputs.update_norm if inputs is not stored else None,
        )
        merge.record(
            stored.group,
            self.spec,
            merged,
            report=report,
            started=started,
            parameters={
                "angle": angle,
                "filter_wise": filter_wise,
                "bounded": bounded,
                "rounding": stored.storage.rounding,
            },
            figures={"ratio": float(t.mean())},
        )
        return merged.weight


def _in_words(t: Tensor) -> str:
    if t.numel() == 1:
        return f"ratio t = {float(t):.4g}"
    return f"ratios t from {float(t.min()):.4g} to {float(t.max()):.4g}, one a row"
