"""Look at the tensors of an inspection on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from mergekit_monosoup.cluster.connection import RayOptions, connected
from mergekit_monosoup.cluster.pool import Driver, Pool, node
from mergekit_monosoup.inspected import Looked, Question
from mergekit_monosoup.inspection import Inspection
from mergekit_monosoup.merging.units import operations
from mergekit_monosoup.report.schema import TensorRecord


class Inspector:
    """What an actor does: open the checkpoints as the driver has, and look at tensors by their names."""

    def __init__(
        self,
        names: Sequence[str],
        cache_dir: str | None,
        revisions: Mapping[str, str],
        question: Question,
        driver: Driver,
    ) -> None:
        """Open the checkpoints: base first, at the driver's commits on the Hub."""
        driver.follow()
        base, *finetuned = names
        self._inspection = Inspection(base, finetuned, cache_dir=cache_dir, revisions=revisions)
        self._question = question

    def look(self, name: str) -> Looked:
        """Look at one tensor, on one core as the driver would."""
        torch.set_num_threads(1)
        looked = self._inspection.look(name, self._question)
        return Looked(looked.record.model_copy(update={"node": node()}), looked.relations)


def looked_on_ray(
    inspection: Inspection,
    names: Sequence[str],
    question: Question,
    seen: Callable[[TensorRecord], None],
    options: RayOptions,
) -> Iterator[Looked]:
    """Yield what `Inspection.look` says of tensors, in their order; they are looked at longest first.

    Args:
        inspection, names, question, seen: as `Inspection.records` has them.
        options: the cluster.

    Raises:
        ConfigurationError: the cluster cannot be reached, or is too small.
        InputError: as `Inspection.records`.
    """
    shapes = inspection.shapes()
    jobs = sorted(names, key=lambda name: operations(name, shapes.get(name, ())), reverse=True)
    arguments = (inspection.names, inspection.cache_dir, inspection.revisions(), question, Driver.here())
    with connected(options):
        pool = Pool(Inspector, arguments, options, most=len(jobs), on_gpu=question.device != "cpu")
        try:
            found: dict[str, Looked] = {}
            order = iter(names)
            awaited = next(order, None)
            for looked in pool.each("look", [(name,) for name in jobs]):
                seen(looked.record)
                found[looked.record.tensor] = looked
                while awaited in found:
                    yield found.pop(awaited)
                    awaited = next(order, None)
        finally:
            pool.close()
