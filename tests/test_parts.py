"""Decompositions that are kept: candidates put together from them are what a merge writes."""

from __future__ import annotations

import itertools
import os
from typing import get_args

import pytest
import torch

from mergekit_monosoup.search.parts_on_disk import PartsOnDisk
from mergekit_monosoup.spectral.edit import EditOptions, edit_weight
from mergekit_monosoup.spectral.matrix import choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.parts import Parts, find_parts, put_together
from mergekit_monosoup.spectral.split import Split

SPLITS = [
    Split(),
    Split(energy=0.5),
    Split(energy=1.0),
    Split("donoho_gavish"),
    Split("donoho_gavish", None, 99),
]


def pair(shape, dtype, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    update = 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if rank is not None:
        update = (
            0.03
            * torch.randn((*shape[:-1], rank), generator=generator, dtype=torch.float64)
            @ torch.randn((*shape[:-2], rank, shape[-1]), generator=generator, dtype=torch.float64)
        )
    return base.to(dtype), (base + update).to(dtype)


def assert_the_same(found, expected, dtype):
    """Equal but for the last place: of float32, and where that is rounded on, of few entries."""
    assert found.dtype == expected.dtype
    difference = (found.double() - expected.double()).abs()
    if dtype in (torch.float32, torch.float64):
        assert float(difference.max()) <= 16 * torch.finfo(dtype).eps * float(expected.abs().max())
    else:
        assert float((difference / expected.double().abs().clamp_min(1e-3)).max()) <= torch.finfo(dtype).eps
        assert float((difference > 0).double().mean()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(48, 80), (96, 40), (3, 24, 40), (24, 40, 3, 3)], ids=str)
def test_parts_put_together_are_the_edit(shape, dtype, one_thread):
    base, tuned = pair(shape, dtype)
    view = choose_view(shape, "experts.weights" if len(shape) == 3 else "conv.weight")
    for split in SPLITS:
        parts = find_parts(base, [tuned], [1.0], EditOptions(split), view)
        for mixing, alpha in itertools.product(get_args(Mixing), (1.0, 0.6)):
            options = EditOptions(split, mixing, alpha)
            expected, _ = edit_weight(base, [tuned], [1.0], options, view)
            assert_the_same(put_together(base, [tuned], [1.0], parts, options, view), expected, dtype)


def test_averages_exact_ranks_and_untouched_rows(one_thread):
    base, first = pair((600, 32), torch.float32, rank=3)
    _, second = pair((600, 32), torch.float32, seed=0)
    for tensor in (first, second):
        tensor[50:580] = base[50:580]
    view = choose_view((600, 32))
    for mixing in get_args(Mixing):
        options = EditOptions(Split(), mixing, 0.9)
        parts = find_parts(base, [first, second], [0.25, 0.75], options, view)
        found = put_together(base, [first, second], [0.25, 0.75], parts, options, view)
        expected, _ = edit_weight(base, [first, second], [0.25, 0.75], options, view)
        assert_the_same(found, expected, torch.float32)
        assert torch.equal(found[50:580], base[50:580])
    nothing = find_parts(base, [base], [1.0], EditOptions(), view)
    assert torch.equal(put_together(base, [base], [1.0], nothing, EditOptions(), view), base)


def test_a_store_keeps_what_it_has_room_for(tmp_path, caplog):
    base, tuned = pair((48, 80), torch.float32)
    view, calls = choose_view((48, 80)), []

    def find() -> Parts:
        calls.append(1)
        return find_parts(base, [tuned], [1.0], EditOptions(), view)

    store = PartsOnDisk(tmp_path / "parts", room=48 * 80 * 4)
    first = store.parts("a", "automatic", find)
    again = store.parts("a", "automatic", find)
    assert len(calls) == 1
    assert torch.equal(first.projection, again.projection)
    assert first.splits == again.splits
    # Of the rule in use there is no room for another tensor, which is said once.
    store.parts("b", "automatic", find)
    store.parts("b", "automatic", find)
    assert len(calls) == 3
    assert 0 <= store.held - 48 * 80 * 4 < 1000
    assert sum("--scratch is full" in record.message for record in caplog.records) == 1
    # Another rule takes the place of the one that is not used any more.
    store.parts("a", "energy", find)
    store.parts("a", "energy", find)
    assert len(calls) == 4
    assert 0 <= store.held - 48 * 80 * 4 < 1000
    # Another process has the same files, and finds again what is cut off.
    PartsOnDisk(tmp_path / "parts", room=0).parts("a", "energy", find)
    assert len(calls) == 4
    (file,) = (tmp_path / "parts").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    PartsOnDisk(tmp_path / "parts", room=0).parts("a", "energy", find)
    assert len(calls) == 5


def test_of_several_rules_the_one_that_was_used_longest_ago_gives_way(tmp_path):
    base, tuned = pair((48, 80), torch.float32)
    view, calls = choose_view((48, 80)), []

    def find() -> Parts:
        calls.append(1)
        return find_parts(base, [tuned], [1.0], EditOptions(), view)

    store = PartsOnDisk(tmp_path / "parts", room=int(2.5 * 48 * 80 * 4))
    for rule, when in (("one", 100), ("two", 200)):
        store.parts("a", rule, find)
        for file in (tmp_path / "parts").glob("*/*"):
            if file.stat().st_mtime > 1000:
                os.utime(file, (when, when))
    store.parts("a", "one", find)
    store.parts("a", "three", find)
    assert len(calls) == 3
    store.parts("a", "one", find)
    assert len(calls) == 3
    store.parts("a", "two", find)
    assert len(calls) == 4
