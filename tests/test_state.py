"""What one merge knows never reaches another: not in threads, not planned side by side, not by path."""

from __future__ import annotations

import gc
import json
import logging
import threading

import pytest
import torch
from checkpoints import build_model, fine_tune, load_tensors, write_adapter
from click.testing import CliRunner
from commands import forget_loaders, recipe, write_config
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from test_sfgs import planned

import mergekit_monosoup
from mergekit_monosoup import host
from mergekit_monosoup.cli import main
from mergekit_monosoup.registry import stock

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


def test_threads_write_reports_of_their_own(tmp_path):
    states = {}
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        base = {f"model{index}.{i}.weight": torch.randn(24, 16, generator=generator) for i in range(20)}
        states[index] = base, {name: t + 0.01 * torch.randn(t.shape) for name, t in base.items()}
    start = threading.Barrier(2)

    def work(index):
        start.wait()
        mergekit_monosoup.edit_state_dict(*states[index], report=str(tmp_path / f"{index}.jsonl"))

    threads = [threading.Thread(target=work, args=(index,)) for index in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in states:
        lines = (tmp_path / f"{index}.jsonl").read_text().splitlines()[1:]
        assert sorted(json.loads(line)["tensor"] for line in lines) == sorted(states[index][0])


def test_lost_tensors_are_named_for_each_of_two_merges_planned_before_either_runs(family, caplog):
    """An architecture that mergekit knows with fewer tensors than the files have."""
    models = family("qwen3-tied", "bf16")
    plans = [planned(recipe(models.base, tuned)) for tuned in models.tuned[:2]]
    for model in models.folders:
        reference = next(m for plan in plans for m in plan[0].model_order if str(m) == str(model))
        LoaderCache().get(reference).index.tensor_paths["model.extra.weight"] = "model.safetensors"
    with caplog.at_level(logging.WARNING):
        for plan in plans:
            for _ in Executor(plan[:1]).run(quiet=True):
                pass
    named = [r.getMessage() for r in caplog.records if "model.extra.weight" in r.getMessage()]
    assert len(named) == 2


def test_the_merges_of_stock_commands_go_with_their_recipes(family):
    models = family("qwen3-tied", "bf16")
    before = set(stock()._plans)
    tasks = planned(recipe(models.base, models.tuned[0]))
    planned_here = set(stock()._plans) - before
    assert planned_here
    del tasks
    # mergekit itself holds on to them here.
    forget_loaders()
    MergePlanner._model_arch.cache_clear()
    gc.collect()
    assert not set(stock()._plans) & planned_here


def test_a_run_leaves_nothing_with_the_stock_commands(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    before = set(stock()._plans)
    merged(tmp_path, recipe(models.base, models.tuned[0]))
    assert set(stock()._plans) <= before


def test_a_retrained_adapter_under_the_same_path_is_seen(tmp_path, family):
    base = family("qwen3-tied", "fp32").base
    adapter = write_adapter(tmp_path / "adapter", base, seed=5)
    cache = ("--lora-merge-cache", str(tmp_path / "cache"))
    config = recipe(base, f"{base}+{adapter}")
    first = merged(tmp_path / "first", config, *cache)
    write_adapter(adapter, base, seed=6)
    second = merged(tmp_path / "second", config, *cache)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def merged(folder, config, *options):
    out = folder / "out"
    result = CliRunner().invoke(main, ["merge", str(write_config(folder, config)), str(out), *options])
    forget_loaders()
    assert result.exit_code == 0, result.output
    return load_tensors(out)


def test_sfgs_decides_over_all_weights_however_they_are_moved():
    """On a device of its own, weights are merged in parts; the decision is over all of them."""
    base = build_model("qwen3-tied")
    tuned = [fine_tune(base, seed=i) for i in (1, 2)]
    together = mergekit_monosoup.edit_state_dict(base, tuned, method="sfgs", threshold=-1.0)
    in_parts = mergekit_monosoup.state_dicts
    before, in_parts._CHUNK_BYTES = in_parts._CHUNK_BYTES, 1
    try:
        apart = mergekit_monosoup.edit_state_dict(base, tuned, method="sfgs", threshold=-1.0)
    finally:
        in_parts._CHUNK_BYTES = before
    assert all(torch.equal(together.weights[name], apart.weights[name]) for name in together.weights)


def test_units_are_what_is_written(tmp_path, family):
    """Names, shapes and dtypes are known before the first tensor is computed."""
    from mergekit_monosoup.merging.architecture import fitting_architecture
    from mergekit_monosoup.merging.units import plan_units
    from mergekit_monosoup.methods.merge import Merge

    models = family("qwen3-untied", "bf16")
    config = recipe(models.base, models.tuned[0], out_dtype="float32")
    parsed = MergeConfiguration.model_validate(config)
    options = MergeOptions()
    host.open_models(parsed.referenced_models(), options)
    arch = fitting_architecture(parsed, options)
    found = plan_units(parsed, arch, options, host.out_config(parsed, arch, False), Merge())
    expected = {(u.name, u.shape, u.dtype) for u in found.units}
    written = merged(tmp_path, config)
    assert {(name, tuple(t.shape), t.dtype) for name, t in written.items()} == expected
