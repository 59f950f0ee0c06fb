"""A device that is not there: tensors that say they lie on it, and refuse to be mixed with those of the host.

PyTorch's backend for devices written in Python carries it. Values live on the CPU, out of reach: whatever a
kernel of a real accelerator would not do is an error here; what makes the host wait or copy is counted.
Once registered, the device is known for the life of the process.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        """Mixed precision is switched off by mergekit, which asks for it."""
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("foreign", _Backend())
FOREIGN = torch.device("foreign:0")

aten = torch.ops.aten
# What copies between devices, and what takes indices from the host as CUDA does.
_CROSSES = {aten.copy_.default, aten._to_copy.default}
_INDEXES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# The host waits for the shape or the value of the result.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}


class Log:
    """Bytes that were copied to the host, by copy, and how often the host waited, by operation."""

    def __init__(self) -> None:
        self.to_host: list[int] = []
        self.waits: Counter[str] = Counter()


_LOGS: list[Log] = []
_LOCK = threading.Lock()


@contextmanager
def watched():
    """Take note of copies and waits."""
    log = Log()
    _LOGS.append(log)
    try:
        yield log
    finally:
        _LOGS.remove(log)


_LARGEST = [1 << 62]


@contextmanager
def room(size):
    """Refuse tensors of more bytes than `size`."""
    before, _LARGEST[0] = _LARGEST[0], size
    try:
        yield
    finally:
        _LARGEST[0] = before


class ForeignTensor(torch.Tensor):
    """A tensor on the foreign device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        if held.nbytes > _LARGEST[0]:
            raise torch.OutOfMemoryError("out of memory")
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=FOREIGN
        )
        self.held = held
        return self

    def __repr__(self, **_):
        return f"foreign{tuple(self.shape)}"

    def numpy(self, **_):
        raise TypeError("can't convert a foreign tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        hosts = [t for t in inputs if not isinstance(t, cls) and t.ndim > 0]
        if hosts and operation not in _CROSSES | _INDEXES:
            raise RuntimeError(f"{operation}: expected all tensors on the same device, found foreign and cpu")
        with _LOCK:
            for log in _LOGS:
                _note(log, operation, args, kwargs)
        target = kwargs.get("device")
        away = target is not None and torch.device(target).type != FOREIGN.type
        if operation is aten.copy_.default and not isinstance(args[0], cls):
            away = True
        if target is not None and not away:
            kwargs["device"] = "cpu"
        known = {id(t.held): t for t in inputs if isinstance(t, cls)}
        held_args, held_kwargs = tree.tree_map_only(cls, lambda t: t.held, (args, kwargs))
        result = operation(*held_args, **held_kwargs)
        if away:
            return result.clone() if operation is aten._to_copy.default and result is args[0].held else result
        return tree.tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else cls(t), result)


def _note(log, operation, args, kwargs):
    target = kwargs.get("device")
    if operation is aten._to_copy.default and target is not None and torch.device(target).type == "cpu":
        log.to_host.append(args[0].numel() * args[0].element_size())
    elif operation is aten.copy_.default and not isinstance(args[0], ForeignTensor):
        log.to_host.append(args[1].numel() * args[1].element_size())
    elif operation in _WAITS:
        log.waits[str(operation)] += 1


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return ForeignTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="cpu"))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    dtype = dtype or torch.get_default_dtype()
    return ForeignTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _made(operation):
    """Make on the host what a kernel would resize an empty tensor for."""
    return lambda *args, **kwargs: ForeignTensor(operation(*args, **{**kwargs, "device": "cpu"}))


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in (
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
    "logspace",
    "randperm",
):
    _packet, _, _overload = _name.partition(".")
    _LIBRARY.impl(_name, _made(getattr(getattr(aten, _packet), _overload or "default")), "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")


def there(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the foreign device."""
    return ForeignTensor(tensor.clone())
