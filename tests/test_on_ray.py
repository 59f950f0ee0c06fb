"""Merges on a local Ray cluster of real processes: the bytes of a local run, whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time

import psutil
import pytest
from checkpoints import write_adapter
from commands import recipe, write_config
from forked import Command, run_command
from reliability_pair import write_slow_pair

# One cluster for all tests of Ray.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def merge(folder, config, *options, check=0):
    file = write_config(folder, config)
    done = run_command("merge", file, folder / "out", "--quiet", *options, env=CLUSTER)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def digests(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json") and file.name != "monosoup_edit.json"
    }


def records(folder):
    lines = [json.loads(line) for line in (folder / "monosoup_report.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        line.pop("seconds", None)
        line.pop("node", None)
    return sorted(lines, key=lambda line: line["tensor"])


def configurations(family, tmp_path):
    models = family("qwen3-tied", "bf16")
    base = models.base
    adapter = write_adapter(tmp_path / "adapter", base)
    one = recipe(base, models.tuned[0])
    return {
        "monosoup": one,
        "gradients": {**one, "parameters": {"alpha": [0.2, 1.0], "energy": 0.8}},
        "tokenizer": {**one, "tokenizer": {"source": "base"}},
        "sfgs": {**recipe(base, *models.tuned), "merge_method": "sfgs"},
        "model_stock_stable": {**recipe(base, *models.tuned), "merge_method": "model_stock_stable"},
        "ties": {**recipe(base, *models.tuned), "merge_method": "ties", "parameters": {"weight": 0.5}},
        "adapter": recipe(base, f"{base}+{adapter}"),
    }


# Workers import all anew for each merge, which is most of its time: two where they share something out
# beforehand, else one.
ONE_WORKER = ["--ray-cpus", "2"]


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("gradients", ONE_WORKER),
        ("tokenizer", ONE_WORKER),
        ("sfgs", []),
        ("model_stock_stable", ONE_WORKER),
        ("ties", ONE_WORKER),
        ("adapter", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_bytes_and_the_report_of_a_local_run(tmp_path, family, cluster, name, workers):
    config = configurations(family, tmp_path)[name]
    options = ["--out-shard-size", "60K"] if name == "gradients" else []
    if name == "adapter":
        options += ["--lora-merge-cache", str(tmp_path / "cache")]
    same_as_here(tmp_path, config, options, ["--ray", cluster, *workers], reported=name != "ties")


def same_as_here(tmp_path, config, options, on_cluster, reported=True):
    for folder in ("local", "ray"):
        (tmp_path / folder).mkdir()
    merge(tmp_path / "local", config, *options)
    merge(tmp_path / "ray", config, *options, *on_cluster)
    local, on_ray = tmp_path / "local" / "out", tmp_path / "ray" / "out"
    assert digests(local) == digests(on_ray)
    if reported:
        assert records(local) == records(on_ray)
        lines = (on_ray / "monosoup_report.jsonl").read_text().splitlines()[1:]
        assert any('"node"' in line for line in lines)
    assert sorted(path.name for path in tmp_path.glob("ray/out*")) == ["out"]


def test_a_cluster_of_its_own(tmp_path, family):
    same_as_here(tmp_path, configurations(family, tmp_path)["monosoup"], [], ["--ray", "local"])


def test_without_a_shared_folder_tensors_come_back(tmp_path, family, cluster, monkeypatch):
    """Workers that look for the output elsewhere, as on a machine with disks of its own."""
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging import on_ray
    from mergekit_monosoup.merging.run import RunOptions, merge_to_folder

    config = configurations(family, tmp_path)["monosoup"]
    text = write_config(tmp_path, config).read_text()
    for folder in ("local", "apart"):
        (tmp_path / folder).mkdir()
    merge_to_folder(text, tmp_path / "local" / "out", MergeOptions(quiet=True))
    seen = []

    class Apart(on_ray.Cluster):
        def __init__(self, prepared, options, path, ray_options):
            super().__init__(prepared, options, path, ray_options)
            self._token.write_text("of another folder")

        def run(self, units, written, write):
            def take(unit, tensor, record):
                seen.append(unit.name)
                write(unit, tensor, record)

            super().run(units, written, take)

    original = on_ray._shared

    def elsewhere(path, token, layout):
        return original(path / "not-here", token, layout)

    # Workers import the module anew: what they see is decided by the token, which is another's.
    monkeypatch.setattr(on_ray, "Cluster", Apart)
    monkeypatch.setattr(on_ray, "_shared", elsewhere)
    options = RunOptions(ray=on_ray.RayOptions(cluster))
    merge_to_folder(text, tmp_path / "apart" / "out", MergeOptions(quiet=True), options)
    assert seen
    assert digests(tmp_path / "local" / "out") == digests(tmp_path / "apart" / "out")


def start(folder, config, *options):
    file = write_config(folder, config)
    return Command("merge", file, folder / "out", "--quiet", *options, env=CLUSTER)


def wait_for_lines(folder, count, running):
    journal = folder / "out.partial" / "monosoup_journal.jsonl"
    while running.poll() is None and not (journal.exists() and journal.read_text().count("\n") > count):
        time.sleep(0.005)
    return running.poll() is None


def workers():
    """Of this cluster, and of no other on the machine."""
    below = psutil.Process().children(recursive=True)
    return [process.pid for process in below if "ray::Worker" in " ".join(process.cmdline())]


def test_a_worker_that_is_killed(tmp_path, cluster):
    config = write_slow_pair(tmp_path)
    for folder in ("local", "ray"):
        (tmp_path / folder).mkdir()
    merge(tmp_path / "local", config)
    running = start(tmp_path / "ray", config, "--ray", cluster)
    if wait_for_lines(tmp_path / "ray", 5, running):
        os.kill(workers()[0], signal.SIGKILL)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert digests(tmp_path / "local" / "out") == digests(tmp_path / "ray" / "out")


def test_a_driver_that_is_killed_is_gone_on_with_here_and_there(tmp_path, cluster):
    config = write_slow_pair(tmp_path)
    (tmp_path / "local").mkdir()
    merge(tmp_path / "local", config)
    for index, (first, then) in enumerate(([["--ray", cluster], []], [[], ["--ray", cluster]])):
        folder = tmp_path / str(index)
        folder.mkdir()
        running = start(folder, config, *first)
        if wait_for_lines(folder, 5, running):
            running.kill()
        running.communicate()
        merge(folder, config, "--resume", *then)
        assert digests(tmp_path / "local" / "out") == digests(folder / "out")


def test_errors_come_back_once_with_their_tensor(tmp_path, family, cluster):
    from checkpoints import copy_with_tensors, load_tensors

    models = family("qwen3-tied", "bf16")
    tensors = load_tensors(models.tuned[0])
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = copy_with_tensors(models.tuned[0], tmp_path / "broken", tensors)
    done = merge(tmp_path, recipe(models.base, broken), "--ray", cluster, check=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "model.layers.1.mlp.up_proj.weight" in errors[0]
    assert "NaN or infinity" in errors[0]


def test_no_cluster(tmp_path, family):
    config = configurations(family, tmp_path)["monosoup"]
    done = merge(tmp_path, config, "--ray", "127.0.0.1:1", check=1)
    assert "no Ray cluster answers" in done.stderr
