"""Where units are computed: every core and every stream of an accelerator is a lane for one thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_monosoup.merging.room import Room
from mergekit_monosoup.spectral.precision import load_linear_algebra

# What a unit holds while it is computed, in copies of its output: inputs, float32 blocks and squares, output.
COPIES = 8
# Streams of an accelerator: while one decomposition waits for memory or for the host, another one goes on.
# Of two, each takes 0.85 times as long as alone on an H200, of four 0.8; and each holds a unit on the device.
_STREAMS = 2


class Lane:
    """A device, and on an accelerator a stream of it.

    Args:
        device: where the arithmetic of a unit is done.
        room: for the units that are on the device at a time.
    """

    def __init__(self, device: torch.device, room: Room) -> None:
        self.device = device
        self.room = room
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def taken(self, size: int, inputs: Iterable[Tensor | None]) -> Iterator[None]:
        """Compute in this lane what is stored in `size` bytes; done when the context is left."""
        with self.room.held(size):
            if self._stream is None:
                yield
                return
            # Inputs that were read to the device come from the stream of the thread that reads.
            self._stream.wait_stream(torch.cuda.default_stream(self.device))
            for tensor in inputs:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                yield
                # What comes next takes the result in a stream of its own.
                self._stream.synchronize()


def lanes(options: MergeOptions) -> list[Lane]:
    """Return the lanes of a merge: a core each, or two streams of each accelerator that it may use."""
    found = []
    for device in _devices(options):
        count, free = torch.get_num_threads(), psutil.virtual_memory().available
        # Whatever method the threads are going to run.
        load_linear_algebra(device)
        if device.type == "cuda":
            count, free = _STREAMS, torch.cuda.mem_get_info(device)[0]
        elif device.type != "cpu":
            count = 1
        room = Room(free // COPIES)
        found += [Lane(device, room) for _ in range(count)]
    return found


def _devices(options: MergeOptions) -> list[torch.device]:
    if not options.multi_gpu:
        return [torch.device(options.device or "cpu")]
    from mergekit.common import get_torch_accelerator_count, get_torch_accelerator_type

    kind = get_torch_accelerator_type(options.device)
    count = get_torch_accelerator_count(options.device)
    return [torch.device(kind, i) for i in range(count)] or [torch.device("cpu")]
