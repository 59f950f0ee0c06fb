"""What the jobs of the study do: train, merge by the real commands, score."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.robustness import commands, methods
from benchmarks.robustness.methods import Method
from benchmarks.robustness.store import Task
from benchmarks.robustness.track import Track
from benchmarks.robustness.tracks import open_track

# A block of a transformer, or of a stage of a convolutional network.
_BLOCK = re.compile(r"^(?:.*?\.stages\.(?P<stage>\d+)|.*?)\.layers?\.(?P<layer>\d+)\.(?P<kind>.*)$")


def pretrain(task: Task) -> dict[str, Any]:
    """Train the base and keep it."""
    track = _track(task)
    track.pretrain(task.folder, task.progress)
    return {"parameters": _parameters(task.folder), "scores": track.scores(task.folder)}


def finetune(task: Task) -> dict[str, Any]:
    """Fine-tune the base by a recipe and keep the checkpoint, or the adapter; score full fine-tunes."""
    track = _track(task)
    recipe = {r.name: r for r in track.recipes}[task.arguments["recipe"]]
    base = task.inputs["base"].folder
    track.finetune(base, recipe, task.arguments["seed"], task.folder, task.progress)
    if recipe.lora_rank is not None:
        return {}
    return {"scores": track.scores(task.folder)}


def merge_and_score(task: Task) -> dict[str, Any]:
    """Merge a fine-tuned checkpoint, or an adapter, by one method and score the result."""
    track, base, tuned = _track(task), task.inputs["base"].folder, task.inputs["tuned"].folder
    adapter = (tuned / "adapter_config.json").exists()
    known = {m.label: m for m in (methods.of_adapter() if adapter else methods.of_one())}
    method = known[task.arguments["method"]]
    space = task.scratch
    if not adapter:
        seconds, out = _merged(method, base, [tuned], space)
    elif _stock(base):
        cache = ("--lora-merge-cache", space / "cache")
        seconds, out = _merged(method, base, [f"{base}+{tuned}"], space, *cache)
    else:
        seconds, out = _merged_adapter(method, base, tuned, space)
    value: dict[str, Any] = {"seconds": seconds, "scores": track.scores(out)}
    if task.arguments.get("records"):
        value["lambdas"] = _lambdas(base, tuned, space)
    return value


def pool(task: Task) -> dict[str, Any]:
    """Merge a pool by the methods that choose no members, and by sfgs over all thresholds."""
    track, base = _track(task), task.inputs["base"].folder
    members = {name: done.folder for name, done in task.inputs.items() if name != "base"}
    names, folders = list(members), list(members.values())
    validation = [task.inputs[name].value["scores"][track.validation] for name in names]
    upwards = [score if track.higher_is_better else -score for score in validation]
    rows: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    scored: dict[tuple[str, ...], dict[str, float]] = {}
    for method in methods.of_pool():
        seconds, out = _merged(method, base, folders, task.scratch)
        row = {"method": method.label, "scores": track.scores(out), "taken": names, "seconds": seconds}
        rows.append(row)
    for threshold in methods.THRESHOLDS:
        found = commands.align(base, folders, upwards, threshold)
        decision = _decision(found, dict(zip(map(str, folders), names, strict=True)))
        key = tuple(sorted(decision["taken"]))
        if key not in scored:
            recipe = methods.sfgs(threshold, upwards)
            _, out = _merged(Method("sfgs", "sfgs", recipe), base, folders, task.scratch)
            scored[key] = track.scores(out)
        decisions.append({"threshold": threshold, **decision, "scores": scored[key]})
    best = names[max(range(len(names)), key=lambda i: upwards[i])]
    single = {"method": "best single", "scores": task.inputs[best].value["scores"], "taken": [best]}
    return {
        "validation": dict(zip(names, validation, strict=True)),
        "cosines": found["average_cosines"],
        "rows": [single, *rows],
        "sfgs": decisions,
    }


def greedy(task: Task) -> dict[str, Any]:
    """Search the greedy soup of a pool by the validation score; keep the journal of scores."""
    track, arguments = _track(task), task.arguments
    members = {str(done.folder): name for name, done in task.inputs.items() if name != "earlier"}
    journal = task.folder / "journal.jsonl"
    if "earlier" in task.inputs:
        # The single checkpoints have been scored there.
        shutil.copy(task.inputs["earlier"].folder / journal.name, journal)
    soup = task.scratch / "soup"
    folders = [Path(folder) for folder in members]
    name, short = arguments["track"], arguments["short"]
    taken = commands.greedy(folders, soup, name, short, journal, not track.higher_is_better)
    return {"taken": [members[str(folder)] for folder in taken], "scores": track.scores(soup)}


def similarity(task: Task) -> dict[str, Any]:
    """Compare the blocks' outputs of merged models with those of base and fine-tuned one by linear CKA."""
    from benchmarks.robustness.cka import cka_by_block

    track, base, tuned = _track(task), task.inputs["base"].folder, task.inputs["tuned"].folder
    known = {m.label: m for m in methods.of_one()}
    outputs = {"base": track.activations(base), "fine-tuned": track.activations(tuned)}
    for label in task.arguments["methods"]:
        _, out = _merged(known[label], base, [tuned], task.scratch)
        outputs[label] = track.activations(out)
    rows = [
        {
            "method": label,
            "inputs": inputs,
            "to": to,
            "values": cka_by_block(blocks[inputs], outputs[to][inputs]),
        }
        for label, blocks in outputs.items()
        for inputs in ("id", "ood")
        for to in ("base", "fine-tuned")
    ]
    return {"cka": rows}


def _track(task: Task) -> Track:
    return open_track(task.arguments["track"], task.arguments["short"])


def _stock(base: Path) -> bool:
    """Whether mergekit's own command merges this architecture; it knows language models."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    return str(config["architectures"][0]).endswith("ForCausalLM")


def _merged(
    method: Method, base: Path, models: list[Any], space: Path, *options: str | Path
) -> tuple[float, Path]:
    """Run the merge; return its seconds and its folder, in the place of the one before."""
    out = space / "merged"
    shutil.rmtree(out, ignore_errors=True)
    run = commands.mergekit_yaml if _stock(base) else commands.merge
    started = time.monotonic()
    run(method.recipe(str(base), [str(model) for model in models]), out, *options)
    return time.monotonic() - started, out


def _merged_adapter(method: Method, base: Path, adapter: Path, space: Path) -> tuple[float, Path]:
    """Do without base+adapter, which mergekit knows for language models alone: peft merges the adapter."""
    started = time.monotonic()
    if method.label == "MonoSoup, exact LoRA":
        commands.monosoup("lora", adapter, space / "edited")
        return time.monotonic() - started, _fold(base, space / "edited", space / "merged")
    folded = _fold(base, adapter, space / "folded")
    if method.family == "fine-tuned":
        return time.monotonic() - started, folded
    plain = replace(method, recipe=methods.monosoup())
    return _merged(plain, base, [folded], space)


def _fold(base: Path, adapter: Path, out: Path) -> Path:
    """Merge an adapter into its base by peft."""
    import torch
    import transformers
    from peft import PeftModel

    name = json.loads((base / "config.json").read_text("utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


def _lambdas(base: Path, tuned: Path, space: Path) -> list[dict[str, Any]]:
    """Run `mergekit-monosoup merge` and read its report."""
    from mergekit_monosoup.report.reader import read_report

    out = space / "reported"
    commands.merge(methods.monosoup()(str(base), [str(tuned)]), out)
    edited = [record for record in read_report(out).records if record.lambda_high is not None]
    positions = sorted({place for record in edited if (place := _place(record.tensor)[0]) is not None})
    fields = ("r", "k", "effective_rank", "rho", "cos_alpha", "lambda_high", "lambda_low")
    rows = []
    for record in edited:
        place, kind = _place(record.tensor)
        block = None if place is None else positions.index(place)
        values = {name: getattr(record, name) for name in fields}
        rows.append({"tensor": record.tensor, "block": block, "kind": kind, **values})
    return rows


def _place(tensor: str) -> tuple[tuple[int, ...] | None, str]:
    """Return the numbers of the block, and the kind: the name without them and without `.weight`."""
    name = tensor.removesuffix(".weight")
    found = _BLOCK.match(name)
    if found is None:
        return None, name
    numbers = [found["stage"], found["layer"]]
    return tuple(int(number) for number in numbers if number is not None), found["kind"]


def _decision(found: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    chosen = found["sfgs"]
    return {
        "order": [names[folder] for folder in chosen["order"]],
        "taken": [names[folder] for folder in chosen["taken"]],
        "averages": {names[folder]: value for folder, value in chosen["average_cosines"].items()},
    }


def _parameters(checkpoint: Path) -> int:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
