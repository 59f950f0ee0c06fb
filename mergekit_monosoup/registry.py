"""The only place that puts our methods into mergekit's registry."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mergekit_monosoup.errors import RegistrationError

if TYPE_CHECKING:
    from mergekit_monosoup.merging.stock import Stock
    from mergekit_monosoup.methods.contract import UpdateMethod


@cache
def our_methods() -> tuple[UpdateMethod, ...]:
    """Return the merge methods of this package, as mergekit's own commands use them."""
    from mergekit_monosoup.methods.dg_hard import DGHard
    from mergekit_monosoup.methods.model_stock import ModelStock
    from mergekit_monosoup.methods.monosoup import MonoSoup
    from mergekit_monosoup.methods.sfgs import SimilarityFilteredGreedySoup

    return (MonoSoup(stock()), DGHard(stock()), ModelStock(stock()), SimilarityFilteredGreedySoup(stock()))


@cache
def stock() -> Stock:
    """Return what keeps the merges of mergekit's own commands in this process."""
    from mergekit_monosoup.merging.stock import Stock

    return Stock()


def method_names() -> tuple[str, ...]:
    """Return the names by which `merge_method:` finds our methods."""
    return tuple(method.spec.name for method in our_methods())


def register() -> tuple[str, ...]:
    """Make our methods known to mergekit in this process; safe to call again.

    Returns:
        The names of the registered methods.

    Raises:
        RegistrationError: another package has taken one of the names.
    """
    from mergekit import merge_methods

    taken = {method.spec.name: method for method in merge_methods.registered_methods()}
    for method in our_methods():
        other = taken.get(method.spec.name)
        if other is method:
            continue
        if other is not None:
            raise RegistrationError(
                f"merge method {method.spec.name!r} is already registered by "
                f"{type(other).__module__}.{type(other).__qualname__}; uninstall that package or "
                "set MERGEKIT_MONOSOUP_AUTOLOAD=0 to keep it"
            )
        merge_methods.register(method)
    return method_names()
