"""Decompositions that are kept: candidates put together from them are what a merge writes."""

from __future__ import annotations

import itertools
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
    # Another tensor, another rule: no room for either, which is said once.
    store.parts("b", "automatic", find)
    store.parts("a", "energy", find)
    assert len(calls) == 3
    assert store.held == 48 * 80 * 4
    assert sum("--scratch is full" in record.message for record in caplog.records) == 1
    # A process that dies while it writes, and one that comes after it.
    (tmp_path / "parts" / "x.part").write_bytes(b"half")
    file = next((tmp_path / "parts").glob("*.safetensors"))
    PartsOnDisk(tmp_path / "parts", room=0).parts("a", "automatic", find)
    assert len(calls) == 3
    assert not list((tmp_path / "parts").glob("*.part"))
    file.write_bytes(file.read_bytes()[:100])
    PartsOnDisk(tmp_path / "parts", room=0).parts("a", "automatic", find)
    assert len(calls) == 4
