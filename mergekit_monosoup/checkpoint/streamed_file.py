"""Write one safetensors file tensor by tensor: whole in its place, or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mergekit_monosoup.checkpoint.output import sync, told
from mergekit_monosoup.checkpoint.safetensors_file import DTYPES
from mergekit_monosoup.errors import ConfigurationError, OutputError

_SPELLINGS = {torch_name: (name, bits) for name, (torch_name, bits) in DTYPES.items()}
# Readers map the file: a tensor must begin where its dtype may lie, and eight bytes suit all of them.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Slot:
    """A tensor to come: its name, shape and dtype (torch's spelling, without `torch.`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        size = _SPELLINGS[self.dtype][1]
        for axis in self.shape:
            size *= axis
        return size // 8


class StreamedFile:
    """A safetensors file whose tensors arrive in any order; none of them is held."""

    def __init__(self, stream: BinaryIO, slots: Sequence[Slot], metadata: Mapping[str, str]) -> None:
        """Write the header; tensors lie in the order of `slots`, those with longer numbers first."""
        self._stream = stream
        self._places: dict[str, tuple[Slot, int]] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        # As the library does: then none begins where numbers of its size may not.
        for slot in sorted(slots, key=lambda slot: -_SPELLINGS[slot.dtype][1]):
            self._places[slot.name] = (slot, end)
            offsets = [end, end + slot.bytes]
            header[slot.name] = {
                "dtype": _SPELLINGS[slot.dtype][0],
                "shape": list(slot.shape),
                "data_offsets": offsets,
            }
            end = offsets[1]
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            OutputError: it has not the shape and dtype that were announced, or is written twice.
        """
        slot, begin = self._places.pop(name)
        if (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) != (slot.shape, slot.dtype):
            raise OutputError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {slot}")
        self._stream.seek(self._start + begin)
        self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that have not come yet."""
        return list(self._places)


@contextmanager
def streamed(out: Path, slots: Sequence[Slot], metadata: Mapping[str, str]) -> Iterator[StreamedFile]:
    """Write a file beside `out` and rename it to `out` when it is complete and on the disk.

    Args:
        out: the file.
        slots: the tensors to come.
        metadata: `__metadata__` of the header.

    Raises:
        OutputError: the disk says no, or a tensor has not come.
    """
    # A link stays a link: its target is replaced.
    place = Path(os.path.realpath(out))
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with told(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as stream:
                file = StreamedFile(stream, slots, metadata)
                yield file
                if file.missing:
                    raise OutputError(f"{out}: {file.missing[0]} was announced and not written")
            sync(partial)
            os.replace(partial, place)
            sync(place.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_taken(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output file that is there already, is an input, or is no place for a file.

    Raises:
        ConfigurationError: in one sentence with the remedy.
    """
    if out.suffix != ".safetensors":
        raise ConfigurationError(f"output {out} must be a file that ends in .safetensors, as the input does")
    if out.is_dir():
        raise ConfigurationError(f"output {out} is a folder; name the file that is to be written")
    for source in inputs:
        if out.exists() and source.exists() and os.path.samefile(out, source):
            raise ConfigurationError(f"output {out} is the input itself; choose another name")
    if out.exists() and not overwrite:
        raise ConfigurationError(
            f"output {out} is there already; choose another name, or pass --overwrite to replace it"
        )
