"""What `plan` prints: kinds of tensors in a row each, all of them with -v and in JSON; estimates."""

from __future__ import annotations

import json

import pytest
import yaml
from checkpoints import copy_with_tensors, load_tensors
from click.testing import CliRunner
from commands import recipe, write_config

from mergekit_monosoup.cli import main
from mergekit_monosoup.planning.estimate import Speed, estimate
from mergekit_monosoup.planning.folding import folded
from mergekit_monosoup.planning.plan import PlanOptions, make_plan
from mergekit_monosoup.planning.planned import PlannedTensor
from mergekit_monosoup.planning.problems import Problems

SPEED = Speed(flops=1e11, eigen_flops=1e10, bytes=1e10, hashed_bytes=1e9, cores=2)


def tensor(name, action="edited", shape=(8, 4), **known):
    return PlannedTensor(name, action, shape, "bfloat16", "8x4", "effective rank", **known)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.{0..2}.w"]),
        (["a.0.w", "a.2.w", "a.3.w", "b"], ["a.{0,2..3}.w", "b"]),
        (["a.7.w"], ["a.7.w"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.{0..1}.e.{0..1}.w"]),
        (["1_Dense.weight", "2_Dense.weight"], ["1_Dense.weight", "2_Dense.weight"]),
        ([], []),
    ],
)
def test_folding(names, kinds):
    found = folded([tensor(name) for name in names])
    assert [kind.name for kind in found] == kinds
    assert [t.tensor for kind in found for t in kind.tensors] == names


def test_what_differs_is_not_folded():
    found = folded([tensor("a.0.w"), tensor("a.1.w", "kept"), tensor("a.2.w", shape=(8, 5)), tensor("a.3.w")])
    assert [kind.name for kind in found] == ["a.{0,3}.w", "a.1.w", "a.2.w"]


def test_rows(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    edit = [{"filter": "layers.1", "value": False}, {"value": True}]
    config = recipe(models.base, models.tuned[0], parameters={"edit": edit})
    file = str(write_config(tmp_path, config))
    short, long = (CliRunner().invoke(main, ["plan", file, *flags]).output for flags in ([], ["-v"]))
    assert "model.layers.{0,2}.mlp.up_proj.weight" in short
    assert "model.layers.1.mlp.up_proj.weight" in short
    names = load_tensors(models.base)
    assert all(name in long for name in names)
    assert len(short.splitlines()) < len(long.splitlines()) - 10
    listed = json.loads(CliRunner().invoke(main, ["plan", file, "--json"]).output)["tensors"]
    assert {entry["tensor"] for entry in listed} == set(names)


def test_many_tensors_of_a_kind_are_one_finding(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    tensors = {k: v for k, v in load_tensors(models.tuned[0]).items() if "self_attn" not in k}
    copy = copy_with_tensors(models.tuned[0], tmp_path / "few", tensors)
    found = make_plan(yaml.safe_dump(recipe(models.base, copy)), PlanOptions(costs=False)).problems
    (problem,) = found.errors
    assert "self_attn" in str(problem)
    assert len(str(problem)) < 400


def test_findings_of_a_kind_are_counted():
    found = Problems()
    for index in range(5):
        found.about(f"w{index}", "missing in x")
    found.about("w9", "missing in y", severity="warning")
    assert [str(p) for p in found.errors] == ["tensors w0, w1 and 3 more: missing in x"]
    assert [str(p) for p in found.warnings] == ["tensor w9: missing in y"]


class TestEstimate:
    def edited(self, rows, columns, count=1):
        size = rows * columns
        known = {"matrices": (count, rows, columns), "read_bytes": 4 * size, "write_bytes": 2 * size}
        return tensor(f"w{rows}", shape=(rows, columns), **known)

    def test_memory_does_not_grow_with_the_number_of_units(self):
        few, many = (estimate([self.edited(1024, 4096)] * count, SPEED).peak_bytes for count in (32, 3200))
        assert few == many

    def test_memory_grows_with_the_largest_units(self):
        small = estimate([self.edited(512, 512)] * 64, SPEED).peak_bytes
        assert estimate([*[self.edited(512, 512)] * 64, self.edited(4096, 4096)], SPEED).peak_bytes > small

    def test_time_is_that_of_the_cores_together_or_of_the_largest_unit(self):
        unit = self.edited(2048, 2048)
        one, eight = estimate([unit], SPEED), estimate([unit] * 8, SPEED)
        alone = one.seconds - one.start_seconds
        assert eight.seconds - eight.start_seconds == pytest.approx(8 * alone / SPEED.cores)

    def test_nothing(self):
        assert estimate([], SPEED).seconds == estimate([], SPEED).start_seconds
