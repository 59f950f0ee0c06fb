"""What `sfgs` costs: how often it reads its inputs, and how much memory it takes.

For N checkpoints in bfloat16 and float32: bytes handed out by mergekit's loaders, over the bytes of
the checkpoints; and peak memory, in copies of the largest tensor in float32. The promise is at most 2
readings and at most N + 3 copies. Memory is what the process has allocated above what it had before
the first task (RssAnon), plus the stored inputs of the largest tensor, which are mapped from their
files and not allocated. mergekit's own `linear` runs beside it. The result of every merge is checked
against float64 before anything is reported.

    python benchmarks/soups.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

COUNTS = (3, 5)
DTYPES = ("bfloat16", "float32")
VOCABULARY, HIDDEN, LAYERS = 40960, 512, 1
MIB = 1 << 20


def write_checkpoints(folder: Path, count: int, dtype: torch.dtype) -> list[Path]:
    """Write a base and `count` fine-tunes; the last points the other way."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3ForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    common = {name: 0.002 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folders = []
    for index in range(count + 1):
        sign = 0 if index == 0 else -1 if index == count else 1
        tensors = {}
        for name, w0 in base.items():
            own = 0.001 * torch.randn(w0.shape, generator=generator) if index else 0
            tensors[name] = (w0 + sign * common[name] + own).to(dtype)
        path = folder / ("base" if index == 0 else f"tuned{index}")
        config.save_pretrained(path)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        folders.append(path)
    return folders


def measured_merge(method: str, folders: list[Path], out: Path) -> dict[str, float]:
    """Run the merge in this process and return what it read, allocated and took."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_monosoup.alignment import stored
    from mergekit_monosoup.registry import register

    register()
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in folders[1:]]
    recipe = {"merge_method": method, "models": models}
    if method == "sfgs":
        recipe = {
            "merge_method": method,
            "base_model": str(folders[0]),
            "models": [{"model": str(path)} for path in folders[1:]],
        }
    read: dict[str, int] = {}
    load = LazyTensorLoader.get_tensor
    memory = Memory()

    def counting(self: LazyTensorLoader, key: str, *args: object, **kwargs: object) -> torch.Tensor:
        memory.start()
        tensor = load(self, key, *args, **kwargs)
        read[self.index.base_path] = read.get(self.index.base_path, 0) + tensor.nbytes
        return tensor

    decide = stored.align_loaders
    decision: list[float] = []

    def timed(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        try:
            return decide(*args, **kwargs)
        finally:
            decision.extend((time.perf_counter() - started, memory.peak()))

    LazyTensorLoader.get_tensor = counting
    from mergekit_monosoup.methods import sfgs

    sfgs.align_loaders = timed
    # One tensor a shard: otherwise the writer's buffer, gigabytes of results, is what is measured.
    options = MergeOptions(out_shard_size=1, write_model_card=False, copy_tokenizer=False, quiet=True)
    started = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    seconds = time.perf_counter() - started
    stored_bytes = (folders[0] / "model.safetensors").stat().st_size
    return {
        "readings": max(read.values()) / stored_bytes,
        "allocated": memory.peak(),
        "decision_allocated": decision[1] if decision else 0.0,
        "seconds": seconds,
        "decision_seconds": decision[0] if decision else 0.0,
    }


class Memory:
    """Peak of what this process has allocated above what it had at the start, in bytes."""

    def __init__(self) -> None:
        self._start: int | None = None
        self._peak = 0

    def start(self) -> None:
        """Begin to sample, once."""
        if self._start is None:
            self._start = self._peak = self._now()
            threading.Thread(target=self._sample, daemon=True).start()

    def peak(self) -> float:
        """Return the peak so far."""
        self._peak = max(self._peak, self._now())
        return float(self._peak - (self._start or 0))

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, self._now())
            time.sleep(0.0005)

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def check(method: str, folders: list[Path], out: Path) -> None:
    """Assert that the merged checkpoint is the mean that it should be, in float64."""
    tuned = folders[1:]
    # The last checkpoint points away from the others, and is left out.
    members = tuned[:-1] if method == "sfgs" else tuned
    written = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in written.items():
        tensor = load_one(out / file, name)
        mean = sum(load_one(path / "model.safetensors", name).double() for path in members) / len(members)
        spacing = torch.finfo(tensor.dtype).eps * mean.abs() + 1e-7 * float(mean.abs().max())
        assert bool(((tensor.double() - mean).abs() <= spacing).all()), f"{method}: {name} is wrong"


def load_one(file: Path, name: str) -> torch.Tensor:
    """Return one tensor of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def row(method: str, count: int, dtype: str, folders: list[Path], out: Path) -> dict[str, float | str]:
    """Merge in a process of its own, check, and put the figures into the units of the promise."""
    command = [sys.executable, __file__, "--worker", method, str(out), *map(str, folders)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    check(method, folders, out)
    largest = VOCABULARY * HIDDEN
    one = largest * 4
    inputs = count + (method == "sfgs")
    mapped = inputs * largest * getattr(torch, dtype).itemsize
    return {
        "method": method,
        "checkpoints": count,
        "dtype": dtype,
        "readings": round(found["readings"], 3),
        "copies": round((found["allocated"] + mapped) / one, 2),
        "decision_copies": round((found["decision_allocated"] + mapped) / one, 2) if method == "sfgs" else "",
        "allowed": count + 3,
        "seconds": round(found["seconds"], 2),
        "decision_seconds": round(found["decision_seconds"], 2) if method == "sfgs" else "",
    }


def main() -> None:
    """Run all cases, print the table, and assert the promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        method, out, *folders = arguments.worker
        print(json.dumps(measured_merge(method, [Path(folder) for folder in folders], Path(out))))
        return
    rows = []
    for dtype in DTYPES:
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as folder:
                folders = write_checkpoints(Path(folder), count, getattr(torch, dtype))
                rows += [row(m, count, dtype, folders, Path(folder) / m) for m in ("linear", "sfgs")]
    header = list(rows[0])
    print(f"largest tensor in float32: {VOCABULARY * HIDDEN * 4 / MIB:.0f} MiB\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for line in rows:
        print("| " + " | ".join(str(line[key]) for key in header) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    for line in rows:
        if line["method"] == "sfgs":
            assert line["readings"] <= 2, line
            assert line["copies"] <= line["allowed"], line


if __name__ == "__main__":
    main()
