"""What a worker of a merge does, called in this process: other commits and other disks than the driver's."""

from __future__ import annotations

import json
import os
import sys

import pytest
from checkpoints import write_adapter
from commands import forget_loaders, recipe, run
from hub_server import COMMIT, running_hub

pytest.importorskip("ray")

WORK = """
import json, os, sys, urllib.request
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit_monosoup import host
from mergekit_monosoup.checkpoint.pinned import revisions_of
from mergekit_monosoup.cluster.pool import Driver
from mergekit_monosoup.merging.adapters import open_adapters
from mergekit_monosoup.merging.on_ray import Worker
from mergekit_monosoup.registry import register

register()
config = MergeConfiguration.model_validate(json.loads(sys.argv[1]))
options = MergeOptions(quiet=True)
models = config.referenced_models()
open_adapters(config, options, Path("copies"))
host.open_models(models, options)
found = revisions_of(models, {m: Path(host.folder_of(m)) for m in models}, None)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/models/org/marker/revision/x").close()
worker = Worker(config.model_dump(mode="json"), options.model_dump(), found, "out", "token", Driver.here())
name = "model.layers.0.self_attn.q_proj.weight"
print(json.dumps([found, worker.compute(name, None).tensor is not None]))
"""


def test_workers_ask_the_hub_for_the_commits_of_the_driver(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    adapter = write_adapter(tmp_path / "adapter", models.base)
    with running_hub() as hub:
        hub.publish("org/base", models.base)
        hub.publish("org/tuned", models.tuned[0])
        hub.publish("org/adapter", adapter)
        hub.publish("org/marker", adapter)
        hub.files["org/marker", "x"] = {}
        sources = ("org/base", "org/tuned", "org/base+org/adapter")
        config = recipe(*sources, merge_method="linear", parameters={"weight": 0.5})
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run([sys.executable, "-c", WORK, json.dumps(config)], tmp_path, environment)
        revisions, came_back = json.loads(done.stdout.splitlines()[-1])
        asked = hub.requests[hub.requests.index("GET /api/models/org/marker/revision/x") + 1 :]
    assert revisions == dict.fromkeys(("org/base", "org/tuned", "org/adapter"), COMMIT)
    assert came_back
    assert asked
    assert all(COMMIT in request for request in asked), [r for r in asked if COMMIT not in r]


def test_a_pinned_recipe_has_the_names_of_the_recipe():
    from mergekit.config import MergeConfiguration

    from mergekit_monosoup.checkpoint.pinned import pinned, source_of

    text = recipe("org/base", "org/tuned@v1", "org/base+org/adapter", tokenizer={"source": "org/tuned@v1"})
    config = MergeConfiguration.model_validate(text)
    known = {"org/base": "a" * 40, "org/tuned@v1": "b" * 40, "org/adapter": "c" * 40}
    found = pinned(config, known)
    assert found.model_dump(mode="json") == config.model_dump(mode="json")
    assert sorted(map(str, found.referenced_models())) == sorted(map(str, config.referenced_models()))
    read = {source_of(p) for m in found.referenced_models() for p in (m.model, m.lora) if p is not None}
    assert read == {f"org/base@{'a' * 40}", f"org/tuned@{'b' * 40}", f"org/adapter@{'c' * 40}"}
    assert found.tokenizer.source in found.referenced_models()
    assert pinned(found, known) == found


@pytest.mark.parametrize(("kernel", "waits"), [("another machine's", True), (None, False)])
def test_another_machine_waits_for_its_disk(tmp_path, family, registered, monkeypatch, kernel, waits):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_monosoup import host
    from mergekit_monosoup.cluster.pool import Driver
    from mergekit_monosoup.merging.on_ray import Worker
    from mergekit_monosoup.merging.prepared import Prepared
    from mergekit_monosoup.merging.writer import Writer

    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, models.tuned[0], merge_method="linear", parameters={"weight": 0.5})
    options = MergeOptions(quiet=True)
    checked = MergeConfiguration.model_validate(config)
    forget_loaders()
    host.open_models(checked.referenced_models(), options)
    Writer.create(tmp_path, Prepared.of(checked, options, []).layout)
    (tmp_path / "monosoup_token").write_text("token")
    here = Driver.here()
    driver = Driver(here.folder, kernel or here.kernel)
    worker = Worker(checked.model_dump(mode="json"), options.model_dump(), {}, str(tmp_path), "token", driver)
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(descriptor) or fsync(descriptor))
    done = worker.compute("model.norm.weight", None)
    forget_loaders()
    assert done.sha256
    assert done.tensor is None
    assert bool(flushed) == waits
