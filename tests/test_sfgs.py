"""`sfgs` through mergekit's own commands: one decision a merge, however the checkpoints are stored."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from baselines import sfgs, soup_of
from checkpoints import (
    VOCABULARY,
    build_model,
    build_tokenizer,
    copy_with_tensors,
    edit_config,
    load_tensors,
    write_adapter,
    write_checkpoint,
)
from commands import merge, recipe, refuse, succeed, write_config
from expectations import assert_tensor
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config, get_architecture_info
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from rounding import as_float64
from soups import recorded_decisions, write_relatives

from mergekit_monosoup.errors import ConfigurationError, ParameterError

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

SHARES = (0.9, -0.8, 0.7, 0.1)


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    """A base and four relatives of it: 1 and 3 agree, 2 opposes them, 4 hardly agrees."""
    base = family("qwen3-tied", "bf16").base
    return base, write_relatives(tmp_path_factory.mktemp("relatives"), base, SHARES)


def soup_recipe(base, tuned, *, scores=None, **parameters):
    config = recipe(base, *tuned, merge_method="sfgs", parameters=parameters)
    for model, score in zip(config["models"], scores or (), strict=False):
        model["parameters"] = {"score": score}
    return config


def arrays(folder):
    return {name: as_float64(tensor) for name, tensor in load_tensors(folder).items()}


def assert_soup(merged, base, tuned, taken):
    stored = load_tensors(base)
    exact = soup_of(arrays(base), [arrays(tuned[index]) for index in taken])
    for name, w0 in stored.items():
        inputs = [w0, *(load_tensors(folder)[name] for folder in tuned)]
        assert_tensor(merged[name], exact[name], inputs, w0.dtype, name)


@pytest.mark.parametrize(("threshold", "scores"), [(0.3, None), (0.0, None), (0.3, [1, 4, 2, 3]), (-1, None)])
def test_merges_the_reference_s_choice(tmp_path, models, threshold, scores):
    base, tuned = models
    taken, _ = sfgs(arrays(base), [arrays(folder) for folder in tuned], threshold, scores=scores)
    config = soup_recipe(base, tuned, threshold=threshold, scores=scores)
    assert_soup(merge(tmp_path, config), base, tuned, taken)


def test_the_log_names_each_candidate_and_its_average_cosine(tmp_path, models, caplog):
    base, tuned = models
    caplog.set_level(logging.INFO, logger="mergekit_monosoup")
    merge(tmp_path, soup_recipe(base, tuned, threshold=0.3))
    (line,) = [r.getMessage() for r in caplog.records if "Similarity-Filtered" in r.getMessage()]
    _, averages = sfgs(arrays(base), [arrays(folder) for folder in tuned], 0.3)
    assert "took 2 of 4 checkpoints at threshold 0.3" in line
    assert f"{tuned[0]} (the first, taken)" in line
    assert f"{tuned[1]} (average cosine {averages[1]:.4f}, left out)" in line
    assert f"{tuned[2]} (average cosine {averages[2]:.4f}, taken)" in line


def test_our_merge_command_writes_the_decision_into_the_card(tmp_path, models):
    from click.testing import CliRunner

    from mergekit_monosoup.cli import main

    base, tuned = models
    config = write_config(tmp_path, soup_recipe(base, tuned, threshold=0.3))
    result = CliRunner().invoke(main, ["merge", str(config), str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Greedy Soup took 2 of 4 checkpoints at threshold 0.3" in card
    assert "left out" in card


def test_sharded_differently(tmp_path, models):
    base, tuned = models
    stored = load_tensors(base)
    model = build_model("qwen3-tied")
    names = {name for name, _ in model.named_parameters()}
    sharded = []
    for index, folder in enumerate([base, *tuned]):
        tensors = load_tensors(folder)
        assert names == set(tensors)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
        where = tmp_path / f"sharded{index}"
        sharded.append(write_checkpoint(where, model, torch.bfloat16, max_shard_size=f"{20 + 7 * index}KB"))
        assert len(list(where.glob("*.safetensors"))) >= 2
    expected = merge(tmp_path / "whole", soup_recipe(base, tuned, threshold=0.3))
    merged = merge(tmp_path / "sharded", soup_recipe(sharded[0], sharded[1:], threshold=0.3))
    assert set(merged) == set(stored)
    assert all(torch.equal(merged[name], expected[name]) for name in stored)


def test_base_plus_lora(tmp_path, family):
    base = family("qwen3-tied", "fp32").base
    adapters = [write_adapter(tmp_path / f"lora{seed}", base, seed=seed) for seed in (5, 6)]
    twin = write_adapter(tmp_path / "twin", base, seed=5)
    config = soup_recipe(base, [f"{base}+{path}" for path in (*adapters, twin)], threshold=0.5)
    with recorded_decisions() as decisions:
        merged = merge(tmp_path, config, "--lora-merge-cache", str(tmp_path / "cache"))
    (decision,) = decisions
    assert [c.taken for c in decision.candidates] == [True, False, True]
    assert decision.candidates[2].average == pytest.approx(1, abs=1e-5)
    # Only what the adapters touch has moved, and only as the first of them moved it.
    (first,) = [p for p in (tmp_path / "cache").iterdir() if p.name.startswith("base") and "lora5" in p.name]
    assert_soup(merged, base, [first], [0])


def test_mergekit_pytorch(tmp_path, models):
    base, tuned = models
    files = [folder / "model.safetensors" for folder in (base, *tuned)]
    config = soup_recipe(files[0], files[1:], threshold=0.3)
    out = tmp_path / "out"
    succeed("mergekit-pytorch", write_config(tmp_path, config), out)
    taken, _ = sfgs(arrays(base), [arrays(folder) for folder in tuned], 0.3)
    assert_soup(load_tensors(out), base, tuned, taken)


def planned(config):
    """The tasks of one merge, without those that write, as `run_merge` would plan them."""
    options = MergeOptions()
    parsed = MergeConfiguration.model_validate(config)
    architecture = get_architecture_info(parsed, options)
    LoaderCache().setup(options)
    for model in parsed.referenced_models():
        LoaderCache().get(model)
    planner = MergePlanner(
        parsed, architecture, options=options, out_model_config=_model_out_config(parsed, architecture)
    )
    # plan_in_memory of mergekit 0.1.5 cannot build its tasks.
    planner._plan()
    return [task for _, task in planner._tensors]


def executed(tasks):
    return {task.output_weight.name: value for task, value in Executor(tasks).run(quiet=True)}


@pytest.mark.parametrize("order", ["one after the other", "planned first", "executed in reverse"])
def test_two_merges_in_one_process_do_not_share_their_decision(models, order):
    base, tuned = models
    configs = [soup_recipe(base, tuned, threshold=threshold) for threshold in (0.3, -1.0)]
    with recorded_decisions() as decisions:
        if order == "one after the other":
            results = [executed(planned(config)) for config in configs]
        else:
            plans = [planned(config) for config in configs]
            if order == "planned first":
                results = [executed(plan) for plan in plans]
            else:
                results = [executed(plan) for plan in reversed(plans)][::-1]
    assert sorted(len(decision.taken) for decision in decisions) == [2, 4]
    for merged, taken in zip(results, [[0, 2], [0, 1, 2, 3]], strict=True):
        assert_soup(merged, base, tuned, taken)


def test_the_same_recipe_again_is_decided_again_when_the_files_have_changed(tmp_path, models):
    base, tuned = models
    folders = [tmp_path / "a", tmp_path / "b"]
    copy_with_tensors(base, folders[0], load_tensors(tuned[0]))
    copy_with_tensors(base, folders[1], load_tensors(tuned[1]))
    config = soup_recipe(base, folders, threshold=0.3)
    with recorded_decisions() as decisions:
        merge(tmp_path / "first", config)
        (folders[1] / "model.safetensors").unlink()
        (folders[1] / "model.safetensors").write_bytes((tuned[2] / "model.safetensors").read_bytes())
        merge(tmp_path / "second", config)
    assert [len(decision.taken) for decision in decisions] == [1, 2]


def test_threads_share_one_decision(models, caplog):
    """What `--multi-gpu` does: the tasks of one plan spread over threads, each with its own executor."""
    base, tuned = models
    caplog.set_level(logging.INFO, logger="mergekit_monosoup")
    tasks = planned(soup_recipe(base, tuned, threshold=0.3))
    merged, errors = {}, []
    start = threading.Barrier(4)

    def work(part):
        try:
            start.wait()
            merged.update(executed(part))
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    tasks = planned(soup_recipe(base, tuned, threshold=0.3))
    threads = [threading.Thread(target=work, args=(tasks[i::4],)) for i in range(4)]
    with recorded_decisions() as decisions:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(decisions) == 1
    assert sum("Similarity-Filtered" in record.getMessage() for record in caplog.records) == 1
    assert_soup(merged, base, tuned, [0, 2])


def test_concurrent_merges_of_the_same_checkpoints(models):
    base, tuned = models
    results, errors = {}, []

    def work(threshold):
        try:
            results[threshold] = executed(planned(soup_recipe(base, tuned, threshold=threshold)))
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(threshold,)) for threshold in (0.3, -1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_soup(results[0.3], base, tuned, [0, 2])
    assert_soup(results[-1.0], base, tuned, [0, 1, 2, 3])


def test_nothing_is_made_on_the_default_device(models):
    """A worker of `--multi-gpu` makes its GPU the default device; the loaders stay on the CPU."""
    base, tuned = models
    tasks = planned(soup_recipe(base, tuned, threshold=0.3))
    with torch.device("meta"):
        merged = executed(tasks)
    assert_soup(merged, base, tuned, [0, 2])


def test_vocabularies_that_a_tokenizer_section_aligns(tmp_path, models):
    base, tuned = models
    grown = []
    for index, folder in enumerate(tuned[:2]):
        tensors = load_tensors(folder)
        rows = torch.zeros(2, tensors["model.embed_tokens.weight"].shape[1], dtype=torch.bfloat16)
        tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], rows])
        where = copy_with_tensors(folder, tmp_path / f"grown{index}", tensors)
        build_tokenizer(extra=("<new0>", "<new1>")).save_pretrained(where)
        edit_config(where, vocab_size=VOCABULARY + 2)
        grown.append(where)
    config = soup_recipe(base, [grown[0], grown[1], tuned[2]], threshold=0.3)
    error = refuse(tmp_path / "refused", config)
    assert "tokenizer" in str(error)
    with recorded_decisions() as decisions:
        merged = merge(tmp_path / "aligned", config | {"tokenizer": {"source": "base"}})
    assert [c.taken for c in decisions[0].candidates] == [True, False, True]
    matrices = [name for name, tensor in load_tensors(base).items() if tensor.ndim >= 2]
    assert decisions[0].tensors == len(matrices) - 1
    assert merged["model.embed_tokens.weight"].shape[0] == VOCABULARY


@pytest.mark.parametrize(
    "parameters",
    [
        {"threshold": [0.1, 0.5]},
        {"threshold": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]},
        {"layers": [{"filter": "mlp", "value": "all"}]},
    ],
    ids=["gradient", "filter", "layers"],
)
def test_a_parameter_that_varies_over_tensors_is_refused(tmp_path, models, parameters):
    base, tuned = models
    error = refuse(tmp_path, soup_recipe(base, tuned, **parameters))
    assert isinstance(error, ParameterError)
    assert "give one value, without filter or gradient" in str(error)


def test_a_score_that_varies_over_tensors_is_refused(tmp_path, models):
    base, tuned = models
    scores = [1, [{"filter": "mlp", "value": 5}, {"value": 2}], 1, 1]
    error = refuse(tmp_path, soup_recipe(base, tuned, scores=scores))
    assert isinstance(error, ParameterError)
    assert "score of" in str(error)


def test_slices_of_different_checkpoints_are_refused_and_forgotten(tmp_path, models):
    base, tuned = models

    def part(low, high, *folders):
        return {"sources": [{"model": str(f), "layer_range": [low, high]} for f in (base, *folders)]}

    config = {"merge_method": "sfgs", "base_model": str(base), "dtype": "bfloat16"}
    slices = [part(0, 1, tuned[0], tuned[1]), part(1, 3, tuned[0], tuned[2])]
    error = refuse(tmp_path / "different", config | {"slices": slices})
    assert isinstance(error, ConfigurationError)
    assert "one decision for the whole model" in str(error)
    slices = [part(0, 1, *tuned), part(1, 3, *tuned)]
    with recorded_decisions() as decisions:
        merged = merge(tmp_path / "same", config | {"slices": slices, "parameters": {"threshold": 0.3}})
    assert len(decisions) == 1
    assert_soup(merged, base, tuned, [0, 2])


def optional_task(config):
    """The task of one tensor as if the architecture called it optional, and all its inputs."""
    task = next(t for t in planned(config) if t.output_weight.name.endswith("down_proj.weight"))
    weight = task.output_weight.model_copy(update={"optional": True})
    tensors = {model: LoaderCache().get(model).get_tensor(weight.name) for model in task.model_order}
    return task.model_copy(update={"output_weight": weight}), weight.name, tensors


@pytest.mark.parametrize("missing", [[], [0], [1], [0, 2], [0, 1, 2, 3]], ids=str)
def test_an_optional_tensor_is_averaged_over_the_taken_that_have_it(models, missing):
    base, tuned = models
    task, name, tensors = optional_task(soup_recipe(base, tuned, threshold=0.3))
    names = [str(tuned[index]) for index in missing]
    present = {model: tensor for model, tensor in tensors.items() if str(model) not in names}
    merged = task.execute(tensors=present)
    members = [arrays(tuned[index])[name] for index in (0, 2) if index not in missing]
    w0 = as_float64(tensors[task.base_model])
    exact = soup_of({name: w0}, [{name: member} for member in members])[name] if members else w0
    assert_tensor(merged, exact, list(tensors.values()), torch.bfloat16)


def test_scores_must_be_known_where_the_decision_is_taken(models):
    base, tuned = models
    task, _, tensors = optional_task(soup_recipe(base, tuned, scores=[1, 2, 3, 4]))
    del tensors[task.model_order[0]]
    with pytest.raises(ParameterError, match="leave out all scores"):
        task.execute(tensors=tensors)
