"""Start-up hook: make the stock mergekit commands know our methods.

`mergekit_monosoup.pth` (up to Python 3.14) or `mergekit_monosoup.start` (PEP 829, from 3.15 on)
calls `install` in every Python process of the environment. Nothing but the standard library may be
imported here before mergekit is, and nothing here may stop Python or mergekit from working.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own constant costs an import of several milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPT_OUT_VARIABLE = "MERGEKIT_MONOSOUP_AUTOLOAD"
PACKAGE = "mergekit"
TARGET = "mergekit.merge_methods"


def install() -> None:
    """Register our methods as soon as `mergekit.merge_methods` is imported; safe to call again.

    When `mergekit` is looked for, `OPENBLAS_THREAD_TIMEOUT` is set where it is not (`spectral/idle.py`).

    Where mergekit has been imported already, the methods are registered at once. Never raises an
    `Exception`: what goes wrong is told in one line on standard error.
    """
    if sys.modules.get(TARGET) is not None:
        if not opted_out():
            _register()
    elif not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def opted_out() -> bool:
    """Return whether `MERGEKIT_MONOSOUP_AUTOLOAD` is `0`, `false`, `off` or `no` at this moment."""
    return os.environ.get(OPT_OUT_VARIABLE, "").strip().lower() in ("0", "false", "off", "no")


class _Finder:
    """Find `mergekit.merge_methods` as the other finders do, and act once it has been executed.

    When `mergekit` itself is looked for, scipy's BLAS is told to let idle threads sleep.
    """

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if fullname not in (PACKAGE, TARGET) or opted_out():
            return None
        if fullname == PACKAGE:
            _prepare()
            return None
        for finder in _after(self):
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec and find_spec(fullname, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: "ModuleSpec") -> None:
        # The loader stays the object that the other finder made, so that reload, inspect and
        # importlib.util.find_spec see nothing of us. Only its exec_module is shadowed, by an
        # attribute of the instance that lasts until the module is executed.
        loader = spec.loader
        original = getattr(loader, "exec_module", None)
        if getattr(original, "__module__", None) == __name__:
            return  # a loader for a whole archive, shadowed when it was asked before

        def exec_module(module: "ModuleType") -> None:
            if module.__name__ != TARGET:
                original(module)  # type: ignore[misc]
                return
            vars(loader).pop("exec_module", None)
            original(module)  # type: ignore[misc]
            self._step_aside()
            _register()

        try:
            if original is None or isinstance(loader, type):
                raise AttributeError
            loader.exec_module = exec_module  # type: ignore[union-attr,method-assign]
        except AttributeError:  # __slots__, or a class that loads other modules as well
            self._step_aside()
            _warn(TypeError(f"cannot follow the loader {loader!r} of {TARGET}"))

    def _step_aside(self) -> None:
        # A new list instead of `remove`: before Python 3.14, a thread in the midst of another
        # import iterates over the old one and would skip a finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


def _after(finder: _Finder) -> "list[object]":
    """Return the finders that the import system would ask after `finder`."""
    finders: list[object] = list(sys.meta_path)
    return finders[finders.index(finder) + 1 :] if finder in finders else finders


def _prepare() -> None:
    """Say how long idle threads of BLAS may spin, which must be known before mergekit brings scipy."""
    try:  # noqa: SIM105 - as in `_warn`
        # Says it when it is imported, and imports the standard library alone.
        import mergekit_monosoup.spectral  # noqa: F401
    except Exception:  # noqa: BLE001 - what is wrong here will be told when the methods are registered
        pass


def _register() -> None:
    try:
        from mergekit_monosoup.registry import register

        register()
    except Exception as error:  # noqa: BLE001 - mergekit must go on, whatever has happened to us
        _warn(error)


def _warn(error: Exception) -> None:
    try:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # noqa: BLE001 - the error cannot even be shown
        cause = type(error).__name__
    try:  # noqa: SIM105 - contextlib would double the cost of the start-up
        # Not by the warnings module: under -W error it would raise.
        sys.stderr.write(
            f"mergekit-monosoup: its merge methods could not be registered ({cause}); mergekit "
            "goes on without them. Run `mergekit-monosoup doctor`, upgrade mergekit-monosoup, or "
            f"set {OPT_OUT_VARIABLE}=0 to switch this off.\n"
        )
    except Exception:  # noqa: BLE001 - standard error is None or closed: nowhere to tell it
        pass
