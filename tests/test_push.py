"""Uploads by the real client to a Hub on the loopback interface; folders that are refused."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors
from click.testing import CliRunner
from commands import run
from hub_server import Hub, running_hub

from mergekit_monosoup.cli import main

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def push(hub: Hub, cwd, *arguments, check=True):
    """Run the command in a fresh process, against the local Hub."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_local",
        "HF_HOME": str(cwd / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    code = "from mergekit_monosoup.cli import main; main(prog_name='mergekit-monosoup')"
    return run([sys.executable, "-c", code, "push", *map(str, arguments)], cwd, env, check)


@pytest.mark.slow
def test_upload_through_a_dropped_connection(tmp_path, family, hub):
    """The first PUT breaks off half-way, and the model arrives all the same."""
    model = family("qwen3-tied", "bf16", max_shard_size="60KB").tuned[0]
    hub.drops = 1
    done = push(hub, tmp_path, model, "tester/soup", "--private", "--revision", "trial")
    assert "complete and finite" in done.stdout
    assert "Traceback" not in done.stdout
    arrived = hub.files["tester/soup", "trial"]
    local = {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}
    assert arrived == local
    wanted = hub.repos["tester/soup"]
    assert wanted.get("private") is True or wanted.get("visibility") == "private"


@pytest.mark.slow
def test_resume_after_a_lost_connection(tmp_path, family, hub):
    """With the connection gone for good the command says so; the next run sends the rest only."""
    model = family("qwen3-tied", "bf16", max_shard_size="60KB").tuned[0]
    shards = len(list(model.glob("*.safetensors")))
    assert shards > 1
    first = sorted(model.glob("*.safetensors"))[0]
    # What an earlier, interrupted upload has brought over.
    content = first.read_bytes()
    hub.objects[hashlib.sha256(content).hexdigest()] = content
    hub.drops = -1
    failed = push(hub, tmp_path, model, "tester/soup", check=False)
    assert failed.returncode == 1
    assert "run the same command again" in failed.stdout
    assert "Traceback" not in failed.stdout
    hub.drops = 0
    push(hub, tmp_path, model, "tester/soup")
    assert len(hub.puts) == shards - 1
    assert hub.files["tester/soup", "main"][first.name] == content


@pytest.mark.slow
def test_pull_request_and_missing_repository(tmp_path, family, hub):
    model = family("qwen3-tied", "bf16").tuned[0]
    failed = push(hub, tmp_path, model, "tester/none", "--create-pr", check=False)
    assert failed.returncode == 1
    assert "leave out --create-pr" in failed.stdout
    hub.repos["tester/soup"] = {}
    done = push(hub, tmp_path, model, "tester/soup", "--create-pr")
    assert f"{hub.url}/tester/soup/discussions/1" in done.stdout


def check(*arguments):
    return CliRunner().invoke(main, ["push", *map(str, arguments), "tester/soup", "--dry-run"])


def test_dry_run_lists_the_files(family):
    model = family("qwen3-tied", "bf16").tuned[0]
    result = check(model)
    assert result.exit_code == 0, result.output
    assert "config.json" in result.output
    assert "nothing uploaded" in result.output


def damaged(kind, source, folder):
    """A copy of a checkpoint with one thing wrong, and what the message must name."""
    tensors = load_tensors(source)
    if kind in ("nan", "infinity"):
        value = float("nan") if kind == "nan" else float("inf")
        tensors[NAME] = torch.full_like(tensors[NAME], value)
    copy_with_tensors(source, folder, tensors)
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config":
        (folder / "config.json").write_text('{"model_type": "no such thing"}')
    elif kind == "cut off":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "stray shard":
        (folder / "model-00001-of-00002.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    elif kind == "missing shard":
        index = {"weight_map": {NAME: "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "nan": NAME,
        "infinity": NAME,
        "no config": "config.json",
        "config": "config.json",
        "cut off": "model.safetensors",
        "no weights": "model.safetensors",
        "stray shard": "model-00001-of-00002.safetensors",
        "missing shard": "model-00001-of-00002.safetensors",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["nan", "infinity", "no config", "config", "cut off", "no weights", "stray shard", "missing shard"],
)
def test_damaged_folders_are_refused(tmp_path, family, kind):
    named = damaged(kind, family("qwen3-tied", "bf16").tuned[0], tmp_path / "model")
    result = check(tmp_path / "model")
    assert result.exit_code == 1
    assert named in result.output
    assert isinstance(result.exception, SystemExit), "a traceback would be shown"


def test_wrong_use(tmp_path, family):
    model = family("qwen3-tied", "bf16").tuned[0]
    assert check(tmp_path / "nowhere").exit_code == 1
    result = CliRunner().invoke(main, ["push", str(model), "a/b", "--create-pr", "--revision", "x"])
    assert result.exit_code == 2
