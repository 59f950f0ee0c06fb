"""`inspect` on a local Ray cluster of real processes: the figures of a local run, to the last digit."""

from __future__ import annotations

import json

import click.testing
import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors, write_adapter

from mergekit_monosoup.cli import main

# One cluster for all tests of Ray.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


def inspect(*arguments, check=0):
    result = click.testing.CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == check, result.output
    return result


def report(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "node", "created"):
            line.pop(key, None)
    return lines


@pytest.mark.parametrize("kind", ["several", "adapter"])
def test_the_figures_of_a_local_run(tmp_path, family, cluster, monkeypatch, kind):
    models = family("qwen3-tied", "bf16")
    monkeypatch.chdir(models.base.parent)
    base = models.base.name
    stranger = {name: torch.randn_like(t) for name, t in load_tensors(models.base).items()}
    tuned = [models.tuned[0].name, str(copy_with_tensors(models.base, tmp_path / "stranger", stranger))]
    if kind == "adapter":
        tuned = [f"{base}+{write_adapter(tmp_path / 'adapter', models.base)}"]
    options = ["--energy", "0.8", "--energy", "0.9"]
    here = inspect(base, *tuned, *options, "--json", tmp_path / "here.jsonl")
    there = inspect(base, *tuned, *options, "--json", tmp_path / "there.jsonl", "--ray", cluster)
    assert report(tmp_path / "here.jsonl") == report(tmp_path / "there.jsonl")
    assert '"node"' in (tmp_path / "there.jsonl").read_text()
    assert here.output.replace("here.jsonl", "there.jsonl") == there.output
    assert ("may not be the base" in there.stderr) == (kind == "several")


def test_an_error_comes_back_with_its_tensor(tmp_path, family, cluster):
    models = family("qwen3-tied", "bf16")
    tensors = load_tensors(models.tuned[0])
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = copy_with_tensors(models.tuned[0], tmp_path / "broken", tensors)
    result = inspect(models.base, broken, "--ray", cluster, check=1)
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "model.layers.1.mlp.up_proj.weight" in errors[0]


def test_what_a_worker_takes_without_a_cluster():
    result = inspect("a", "b", "--ray-cpus", "2", check=2)
    assert "pass --ray too" in result.output


@pytest.mark.parametrize("threads", [1, 3])
def test_whatever_the_number_of_cores(family, threads):
    from mergekit_monosoup.inspected import Question
    from mergekit_monosoup.inspection import Inspection

    models = family("qwen3-tied", "bf16")
    inspection = Inspection(str(models.base), [str(models.tuned[0])])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = list(inspection.records(inspection.tensors, Question()))
        torch.set_num_threads(1)
        alone = [inspection.look(name, Question()).record for name in inspection.tensors]
    finally:
        torch.set_num_threads(before)
    assert found == alone
