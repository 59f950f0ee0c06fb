"""Whole merges on an accelerator: the same bytes however the work is laid out, and the CPU's model."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import load_tensors
from commands import forget_loaders, recipe, succeed, write_config

from mergekit_monosoup.spectral import edit_weight
from mergekit_monosoup.spectral.precision import float64_pays
from mergekit_monosoup.spectral.update import smaller_pieces

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
LAYOUTS = {
    "again": {},
    "results stay on the device": {"low_cpu_memory": True},
    "inputs are read to the device": {"read_to_gpu": True},
    "every device": {"multi_gpu": True, "low_cpu_memory": True, "read_to_gpu": True},
}


def merge(folder, models, method="monosoup", **options):
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging.run import merge_to_folder

    forget_loaders()
    config = recipe(models.base, *models.tuned, merge_method=method)
    options = MergeOptions(quiet=True, copy_tokenizer=False, **{"device": "cuda", **options})
    merge_to_folder(write_config(folder, config).read_text(), folder / "out", options)
    return load_tensors(folder / "out")


def assert_the_same_model(here, there):
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        # Rounded from values a few 1e-6 apart: the same but for the odd tie.
        assert float((tensor != there[name]).float().mean()) <= 1e-2, name


@pytest.mark.parametrize("method", ["monosoup", "dg_hard", "sfgs", "model_stock_stable"])
def test_on_the_card_as_on_the_cpu(method, registered, family, tmp_path):
    models = family("qwen3-tied", "bf16")
    on_card = merge(tmp_path / "card", models, method)
    assert_the_same_model(merge(tmp_path / "cpu", models, method, device="cpu"), on_card)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_work_changes_nothing(layout, registered, family, tmp_path):
    models = family("qwen3-tied", "bf16")
    plain, other = merge(tmp_path / "plain", models), merge(tmp_path / "other", models, **LAYOUTS[layout])
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("flags", [["--cuda"], ["--gpu-rich"]], ids=str)
def test_the_stock_command(flags, registered, family, tmp_path):
    models = family("qwen3-tied", "bf16")
    config = write_config(tmp_path, recipe(models.base, *models.tuned))
    succeed("mergekit-yaml", config, tmp_path / "out", "--no-copy-tokenizer", *flags)
    assert_the_same_model(merge(tmp_path / "cpu", models, device="cpu"), load_tensors(tmp_path / "out"))


def pairs(count, rows, columns):
    generator = torch.Generator(CUDA).manual_seed(0)
    for _ in range(count):
        base = torch.randn(rows, columns, device=CUDA, generator=generator)
        yield base, base + 0.01 * torch.randn(rows, columns, device=CUDA, generator=generator)


def test_lanes_change_nothing(registered):
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging.lanes import lanes

    found = list(pairs(6, 700, 600))
    places = lanes(MergeOptions(device="cuda"))
    assert len(places) > 1
    assert {lane.device.type for lane in places} == {"cuda"}

    def work(index):
        with places[index % len(places)].taken(0, found[index]):
            return edit_weight(found[index][0], [found[index][1]])[0]

    with ThreadPoolExecutor(len(places)) as pool:
        together = list(pool.map(work, range(len(found))))
    torch.cuda.synchronize()
    for (base, tuned), result in zip(found, together, strict=True):
        assert torch.equal(result, edit_weight(base, [tuned])[0])


def test_first_decompositions_of_several_threads():
    """Torch loads its linear algebra at the first call, and fails if two come at the same time."""
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor\n"
        "from mergekit_monosoup.spectral import edit_update\n"
        "updates = [torch.randn(300, 200, device='cuda') for _ in range(8)]\n"
        "with ThreadPoolExecutor(8) as pool: print(len(list(pool.map(edit_update, updates))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "8", done.stderr


def test_smaller_pieces_fit_where_the_usual_ones_do_not():
    (base, tuned), *_ = pairs(1, 65536, 512)
    base, tuned = base.bfloat16(), tuned.bfloat16()
    expected, _ = edit_weight(base, [tuned])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    # The result and a little: blocks of 64 million entries do not fit.
    room = torch.cuda.memory_allocated() + 5 * base.numel()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            edit_weight(base, [tuned])
        torch.cuda.empty_cache()
        with smaller_pieces():
            result, _ = edit_weight(base, [tuned])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert float((result != expected).float().mean()) <= 1e-2


def test_float64_is_tried_once_and_decides():
    pays = float64_pays(CUDA)
    (base, tuned), *_ = pairs(1, 700, 300)
    _, record = edit_weight(base.bfloat16(), [tuned.bfloat16()])
    assert record.matrices[0].backend == ("gram64" if pays else "gram32")
    assert not float64_pays(torch.device("cpu"))


def test_models_on_two_devices(registered):
    from mergekit_monosoup import edit_state_dict

    ((base, tuned),) = pairs(1, 64, 48)
    for method in ("monosoup", "sfgs"):
        mixed = edit_state_dict({"w": base.cpu()}, {"w": tuned}, method=method).weights["w"]
        there = edit_state_dict({"w": base}, {"w": tuned}, method=method).weights["w"]
        assert mixed.device == tuned.device
        assert torch.equal(mixed, there)
