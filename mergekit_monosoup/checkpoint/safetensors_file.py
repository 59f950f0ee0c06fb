"""The header of a safetensors file, held to what the format promises before anything trusts it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mergekit_monosoup.checkpoint.documents import first_line, shown
from mergekit_monosoup.errors import InputError

# safetensors' spelling -> (torch's spelling, bits)
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}
# The library's own bound.
_LARGEST_HEADER = 100_000_000
# Twice what the models with the most experts have in all.
MOST_TENSORS = 500_000
_LONGEST_NAME = 300


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `begin` counts from the end of the header."""

    shape: tuple[int, ...]
    dtype: str
    begin: int


def read_entries(file: Path) -> tuple[int, dict[str, Entry]]:
    """Read and check the header of a local file.

    Returns:
        The byte at which the data begins, and the tensors by name.

    Raises:
        InputError: no safetensors file, or a header that contradicts itself or the file's size.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise InputError(f"{file} is not a safetensors file, or is cut off; download it again")
        raw = stream.read(length)
    header = _parsed(raw, file)
    entries, end = checked_entries(header, file)
    whole = 8 + length + end
    if whole > size:
        raise InputError(
            f"{file} is cut off: its header promises {whole} bytes and it has {size}; download it again"
        )
    if whole < size:
        raise InputError(
            f"{file} is longer than its header says: {size} bytes instead of {whole}; download it again"
        )
    return 8 + length, entries


def _parsed(raw: bytes, file: Path) -> dict[str, Any]:
    # Counted before they are built: a million tensors would take gigabytes.
    count = raw.count(b'"data_offsets"')
    if count > MOST_TENSORS:
        raise InputError(f"{file} holds {count:,} tensors; more than {MOST_TENSORS:,} are not read")
    if not raw.startswith(b"{"):
        _damaged(file, "it is no JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
        if isinstance(header, dict) and count != len(header.keys() - {"__metadata__"}):
            json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except RecursionError as error:
        raise InputError(f"{file} has a damaged header (nested without end); download it again") from error
    except ValueError as error:
        raise InputError(f"{file} has a damaged header ({first_line(error)}); download it again") from error
    if not isinstance(header, dict):
        _damaged(file, "it is no JSON object")
    return header


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


def checked_entries(header: Mapping[str, Any], file: Path | str) -> tuple[dict[str, Entry], int]:
    """Return the tensors of a parsed header and the number of bytes that they take.

    Raises:
        InputError: it contradicts itself.
    """
    entries: dict[str, Entry] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                _damaged(file, "__metadata__ is no mapping of texts")
            continue
        if len(name) > _LONGEST_NAME:
            _damaged(file, f"a name is {len(name)} characters long")
        if not name.isprintable():
            _damaged(file, f"the name {shown(name)} holds control characters")
        begin, end, entries[name] = _entry(name, entry, file)
        places.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(places):
        if begin != position:
            what = "overlaps with another tensor" if begin < position else "leaves bytes before it unused"
            _damaged(file, f"{shown(name)} {what}")
        position = end
    return entries, position


def _entry(name: str, entry: Any, file: Path | str) -> tuple[int, int, Entry]:
    shape, offsets, kind = (
        (entry.get(key) for key in ("shape", "data_offsets", "dtype"))
        if isinstance(entry, dict)
        else [None] * 3
    )
    if not (isinstance(shape, list) and all(type(axis) is int and axis >= 0 for axis in shape)):
        _damaged(file, f"{shown(name)} has no proper shape")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)
    ):
        _damaged(file, f"{shown(name)} has no proper data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        _damaged(file, f"{shown(name)} is of the unknown dtype {shown(kind)}")
    dtype, bits = DTYPES[kind]
    begin, end = offsets
    if math.prod(shape) * bits != 8 * (end - begin):
        _damaged(file, f"{shown(name)} takes {end - begin} bytes, which do not fit its shape and dtype")
    return begin, end, Entry(tuple(shape), dtype, begin)


def _damaged(file: Path | str, what: str) -> NoReturn:
    raise InputError(f"{file} has a damaged header ({what}); download it again")
