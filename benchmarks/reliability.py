"""Kill merges at random moments, go on with each, and compare the result with an uninterrupted one.

`python benchmarks/reliability.py --kills 200`: every merge is a process of its own that gets SIGKILL, at a
moment spread evenly over its run; then the same merge is called again with `--resume`, and killed again
with some probability, until it ends. Weights, index and configuration must equal the uninterrupted ones
byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# What a merge writes that does not say when it was made.
COMPARED = ("*.safetensors", "*.index.json", "config.json", "mergekit_config.yml")


@dataclass(frozen=True)
class Outcome:
    """What became of one merge: how often it was killed, how much of it was kept, and whether it is right."""

    kills: int
    kept: int
    identical: bool


def main() -> None:
    """Run the kills and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="monosoup")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-kills-") as name:
        outcomes = kill_and_resume(Path(name), options.kills, options.seed, options.method)
    figures = {
        "method": options.method,
        "kills": sum(o.kills for o in outcomes),
        "merges": len(outcomes),
        "byte-identical": sum(o.identical for o in outcomes),
        "tensors kept by a resumed merge, median": sorted(o.kept for o in outcomes)[len(outcomes) // 2],
    }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    sys.exit(figures["byte-identical"] != figures["merges"])


def kill_and_resume(folder: Path, kills: int, seed: int, method: str = "monosoup") -> list[Outcome]:
    """Merge a small generated pair until so many merges have been killed; one outcome for each merge."""
    recipe = write_pair(folder, method)
    # Everything is imported before the first fork, so that a kill hits the merge and not the imports.
    import mergekit_monosoup.cli.merge
    import mergekit_monosoup.merging.run  # noqa: F401

    started = time.monotonic()
    reference = folder / "reference"
    if finished(start(recipe, reference)) != 0:
        raise RuntimeError("the uninterrupted merge failed")
    duration = time.monotonic() - started
    expected = digests(reference)
    generator = random.Random(seed)
    outcomes: list[Outcome] = []
    while sum(o.kills for o in outcomes) < kills:
        outcomes.append(_one(folder / f"out{len(outcomes)}", recipe, expected, duration, generator))
        print(f"{len(outcomes)}: {outcomes[-1]}", file=sys.stderr, flush=True)
    return outcomes


def _one(
    out: Path, recipe: Path, expected: dict[str, str], duration: float, generator: random.Random
) -> Outcome:
    killed = kept = 0
    while True:
        child = start(recipe, out, "--resume")
        if killed == 0 or generator.random() < 0.3:
            time.sleep(generator.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        if finished(child) == 0:
            break
        killed += 1
        journal = out.with_name(out.name + ".partial") / "monosoup_journal.jsonl"
        kept = max(kept, journal.read_text("utf-8").count('{"tensor"') if journal.exists() else 0)
    same = digests(out) == expected and not out.with_name(out.name + ".partial").exists()
    shutil.rmtree(out)
    return Outcome(killed, kept, same)


def start(recipe: Path, out: Path, *options: str) -> int:
    """Run our merge command in a process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    # Silent: what a killed process says is of no interest, and its parent may be a test.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    import tqdm

    from mergekit_monosoup.cli import main as command

    # tqdm shares a lock among forked processes, which one that was killed never gives back.
    tqdm.tqdm.set_lock(threading.RLock())
    try:
        command(["merge", str(recipe), str(out), "--quiet", *options], standalone_mode=False)
    except BaseException:  # noqa: BLE001 - the exit status tells the parent
        os._exit(1)
    os._exit(0)


def finished(child: int) -> int:
    """Wait for a process and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of the files that must not depend on interruptions."""
    files = [file for pattern in COMPARED for file in sorted(folder.glob(pattern))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_pair(folder: Path, method: str) -> Path:
    """Write a base, two fine-tuned checkpoints of a few dozen layers, and a recipe in several shards."""
    import torch
    import transformers
    import yaml

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for index in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(2e-3 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"tuned{index}")
    tuned = (
        [folder / "tuned1"] if method in ("monosoup", "dg_hard") else [folder / "tuned1", folder / "tuned2"]
    )
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(path)} for path in tuned],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    return file


if __name__ == "__main__":
    main()
