"""Notice tensors that mergekit's plan leaves out, whichever command made the plan.

mergekit asks a method to validate the inputs of every tensor that it plans, before the first is
merged. What it has not asked about by then will not be in the merged model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit.common import ModelReference

LOG = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class Ledger:
    """The names that were planned since the last merge, and the checkpoints they come from."""

    planned: set[str] = field(default_factory=set)
    models: set[ModelReference] = field(default_factory=set)
    planning: bool = False

    def start(self, input_ids: Iterable[Hashable]) -> None:
        """Take note of a recipe, or of one of its slices; the first after a merge starts afresh."""
        if not self.planning:
            self.planned.clear()
            self.models.clear()
            self.planning = True
        # Imported here and below: it brings transformers, which a mere registration must not.
        from mergekit.common import ModelReference

        self.models |= {i for i in input_ids if isinstance(i, ModelReference)}

    def note(self, name: str) -> None:
        """Take note of a tensor of the plan."""
        if self.planning:
            self.planned.add(name)

    def close(self) -> None:
        """End the plan, and name the tensors of its inputs that the merged model will not have."""
        if not self.planning:
            return
        self.planning = False
        for model in self.models:
            lost = _lost(model, self.planned)
            if lost:
                from mergekit_monosoup.checkpoint.coverage import describe

                LOG.warning(
                    "%d tensors of %s will not be in the merged model, because mergekit's definition of "
                    "its architecture does not have them: %s. `mergekit-monosoup merge` takes them by "
                    "their names",
                    len(lost),
                    model,
                    describe(lost),
                )
                return


def _lost(model: ModelReference, planned: set[str]) -> list[str]:
    from mergekit.architecture import arch_info_for_config
    from mergekit.io.tasks import LoaderCache

    from mergekit_monosoup.checkpoint.coverage import check_coverage, weights_named

    loader = LoaderCache.loaders.get(model)
    if loader is None:
        # mergekit-pytorch plans by the names in the files.
        return []
    try:
        config = model.config(trust_remote_code=LoaderCache().trust_remote_code)
    except (OSError, ValueError):
        # A bare state dict, as other front ends of mergekit may merge: nothing says what is missing.
        return []
    arch = arch_info_for_config(config)
    weights = weights_named(planned, arch.all_weights(config) if arch else ())
    lost = check_coverage(weights, loader.index.tensor_paths, config.model_type).lost
    # A recipe may leave layers out or move them on purpose.
    planned_in_some_layer = {_NUMBER.sub("#", name) for name in planned}
    return [name for name in lost if _NUMBER.sub("#", name) not in planned_in_some_layer]


LEDGER = Ledger()
