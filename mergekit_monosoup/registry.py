"""The only place that puts our methods into mergekit's registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_monosoup.errors import RegistrationError

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod


def our_methods() -> tuple[MergeMethod, ...]:
    """Return one instance of each merge method of this package."""
    from mergekit_monosoup.methods.model_stock import MODEL_STOCK
    from mergekit_monosoup.methods.monosoup import MONOSOUP
    from mergekit_monosoup.methods.sfgs import SFGS

    return (MONOSOUP, MODEL_STOCK, SFGS)


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
