"""What the tensors of one merge share, for methods that decide once for the whole model.

mergekit hands a merge method one tensor group at a time, and says neither which merge the group
belongs to nor what else is in it. But while it plans, in one thread and one merge after another, it
validates the recipe's inputs first and then resolves every parameter of every tensor, defaults
included. `plan_parameter` is a parameter whose default resolves to the plan under way: each tensor
so carries its own merge's plan to wherever it is executed. Nothing is looked up in a global table
that would have to guess when a merge begins and ends, and the plan goes when its tasks go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Generic, TypeVar

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import BeforeValidator

from mergekit_monosoup.errors import ConfigurationError, ParameterError

DecisionT = TypeVar("DecisionT")

PLAN = "_plan"


class MergePlan(Generic[DecisionT]):
    """One merge: its checkpoints, its settings, and its decision once that is taken."""

    def __init__(self, *, in_memory: bool = False) -> None:
        self.in_memory = in_memory
        self.base: Hashable | None = None
        self.finetuned: tuple[Any, ...] = ()
        self.parts: list[str | None] = []
        self._lock = threading.Lock()
        self._settings: dict[str, Any] = {}
        self._settled_by: dict[str, str | None] = {}
        self._decision: DecisionT | None = None

    def add_part(self, name: str | None, finetuned: tuple[Any, ...], base: Hashable | None) -> None:
        """Note the checkpoints of the recipe or of one of its slices.

        Raises:
            ConfigurationError: they differ from those of the slices before.
        """
        if self.parts and (finetuned, base) != (self.finetuned, self.base):
            raise ConfigurationError(
                f"{name} lists other checkpoints than {self.parts[0]}, or lists them in another order; "
                "this method takes one decision for the whole model, so all slices must list the same"
            )
        self.parts.append(name)
        self.finetuned, self.base = finetuned, base

    def decide(
        self, settings: dict[str, Any], tensor: str | None, take: Callable[[], DecisionT]
    ) -> DecisionT:
        """Return the decision of this merge, taking it if this tensor is the first to ask.

        Threads that ask meanwhile wait.

        Args:
            settings: the parameters that `tensor` was given, by the name the recipe would use.
            tensor: for the message.
            take: takes the decision.

        Raises:
            ParameterError: a parameter differs from what another tensor of the merge was given.
        """
        with self._lock:
            for key, value in settings.items():
                if self._settings.setdefault(key, value) != value:
                    raise ParameterError(
                        f"parameter {key!r} is {self._settings[key]!r} for tensor {self._settled_by[key]} "
                        f"and {value!r} for tensor {tensor}; the decision is taken once for the whole "
                        "model, so give one value, without filter or gradient"
                    )
                self._settled_by.setdefault(key, tensor)
            if self._decision is None:
                self._decision = take()
            return self._decision


class _Planning(threading.local):
    """The plan under way in this thread."""

    plan: MergePlan[Any] | None = None
    # Set once mergekit has gone on from the recipe to its tensors.
    sealed: bool = False


_PLANNING = _Planning()


def announce(
    name: str | None,
    input_ids: Sequence[Hashable],
    base: Hashable | None,
    create: Callable[[], MergePlan[Any]] = MergePlan,
) -> None:
    """Begin a plan, or add a slice to the one that has just begun.

    Args:
        name: what mergekit calls the part; None for the whole.
        input_ids: all checkpoints, the base among them.
        base: the base.
        create: makes the plan if one is to be begun.

    Raises:
        ConfigurationError: the slices of the recipe list different checkpoints.
    """
    plan = _PLANNING.plan
    if plan is not None and plan.in_memory:
        return
    if plan is None or _PLANNING.sealed or name in plan.parts:
        plan = create()
    # Not left behind for the next merge if this one is refused.
    _PLANNING.plan = None
    plan.add_part(name, tuple(key for key in input_ids if key != base), base)
    # A nameless part is the whole recipe: nothing will join it.
    _PLANNING.plan, _PLANNING.sealed = plan, name is None


@contextmanager
def in_memory_plan(plan: MergePlan[Any]) -> Iterator[None]:
    """Make `plan` the one under way, for a call that has all its tensors in hand."""
    _PLANNING.plan, _PLANNING.sealed = plan, True
    try:
        yield
    finally:
        _PLANNING.plan = None


def _plan_under_way(value: Any) -> MergePlan[Any]:
    if value is not None:
        raise ParameterError(f"parameter {PLAN!r} is internal; remove it from the recipe")
    _PLANNING.sealed = True
    if _PLANNING.plan is None:
        _PLANNING.plan = MergePlan()
    return _PLANNING.plan


def plan_parameter() -> ParameterSpec:
    """Return the parameter by which every tensor carries the plan of its merge."""
    return ParameterSpec(
        PLAN,
        Annotated[Any, BeforeValidator(_plan_under_way)],
        ParameterScope.SHARED,
        default=None,
        description="internal: the merge that the tensor belongs to",
    )
