"""MonoSoup for mergekit: edit one fine-tuned checkpoint with the help of its base alone.

The names below are imported on first use: the start-up hook imports this package in every
Python process of the environment, so the package itself must cost next to nothing.
"""

TYPE_CHECKING = False  # as in typing, which takes longer to import than all of this

if TYPE_CHECKING:
    from mergekit_monosoup.errors import MonoSoupError
    from mergekit_monosoup.merging.completing import complete
    from mergekit_monosoup.registry import method_names, register
    from mergekit_monosoup.search.modules import TunedModule, tune
    from mergekit_monosoup.spectral.edit import edit_update
    from mergekit_monosoup.spectral.record import EditRecord
    from mergekit_monosoup.state_dicts import EditedWeights, edit_module, edit_state_dict

__all__ = [
    "EditRecord",
    "EditedWeights",
    "MonoSoupError",
    "TunedModule",
    "__version__",
    "complete",
    "edit_module",
    "edit_state_dict",
    "edit_update",
    "method_names",
    "register",
    "tune",
]

_HOME = {
    "EditRecord": "mergekit_monosoup.spectral.record",
    "EditedWeights": "mergekit_monosoup.state_dicts",
    "MonoSoupError": "mergekit_monosoup.errors",
    "TunedModule": "mergekit_monosoup.search.modules",
    "complete": "mergekit_monosoup.merging.completing",
    "edit_module": "mergekit_monosoup.state_dicts",
    "edit_state_dict": "mergekit_monosoup.state_dicts",
    "edit_update": "mergekit_monosoup.spectral.edit",
    "method_names": "mergekit_monosoup.registry",
    "register": "mergekit_monosoup.registry",
    "tune": "mergekit_monosoup.search.modules",
}


def __getattr__(name: str) -> object:
    import importlib

    value: object
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version("mergekit-monosoup")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
