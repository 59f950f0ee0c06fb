"""Time `mergekit-monosoup lora` on an adapter of Llama-3-70B's shapes, every projection at rank 64.

The factors are generated: normally distributed, with a spectrum that decays as a trained adapter's
does. Nothing is timed before a sample of modules has been compared with a float64 QR and SVD of the
same factors. Reading, editing and writing are timed apart; the page cache is warm after the files have
been written, so that the time for reading is that of memory.

    python benchmarks/lora_70b.py [--layers 80] [--rank 64] [--threads 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from mergekit_monosoup.lora.adapter import Adapter, read_adapter
from mergekit_monosoup.lora.editing import AdapterOptions, edit_adapters
from mergekit_monosoup.lora.factors import edit_factors
from mergekit_monosoup.lora.writer import write_adapter
from mergekit_monosoup.spectral import mixing_coefficients, split_index

HIDDEN, INTERMEDIATE, KEY_VALUE = 8192, 28672, 1024
# projection -> out, in
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def generate(folder: Path, layers: int, rank: int) -> int:
    """Write an adapter as peft would, in bfloat16; return its size in bytes."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, rank).bfloat16()
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.empty(rank, columns, dtype=torch.bfloat16).normal_(generator=generator)
            b = torch.empty(rows, rank, dtype=torch.bfloat16).normal_(generator=generator)
            tensors[f"{key}.lora_A.weight"] = a
            tensors[f"{key}.lora_B.weight"] = b.mul_(decay)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [name.rpartition(".")[2] for name in SHAPES]
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    return (folder / "adapter_model.safetensors").stat().st_size


def check(adapter: Adapter) -> float:
    """Compare the first layer's modules with a float64 QR and SVD; return the largest error found."""
    worst = 0.0
    for module in adapter.modules[: len(SHAPES)]:
        update = module.update(adapter.tensors)
        edited, record = edit_factors(update)
        b, a = update.left[0].double(), update.right[0].double()
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T)
        k = split_index(s)
        c = mixing_coefficients(s, k, "monosoup")
        lambdas = torch.full_like(s, c.lambda_low)
        lambdas[:k] = c.lambda_high
        assert k == record.k, (module.module, k, record.k)
        # Both products have the row space of A: comparing them in its orthonormal basis is exact.
        want = q_b @ (u * (s * lambdas)) @ vt
        error = (edited.left[0].double() @ r_a.T - want).abs().max() / want.abs().max()
        worst = max(worst, float(error))
        del q_a
    assert worst < 1e-5, worst
    return worst


def main() -> None:
    """Generate, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        size = generate(source, options.layers, options.rank)
        worst = check(read_adapter(str(source)))
        start = time.perf_counter()
        adapter = read_adapter(str(source))
        read = time.perf_counter()
        edited = edit_adapters([adapter], AdapterOptions())
        done = time.perf_counter()
        write_adapter(edited, [adapter], AdapterOptions(), out)
        written = time.perf_counter()
        result = {
            "modules": len(adapter.modules),
            "rank": options.rank,
            "gigabytes": round(size / 1e9, 2),
            "threads": options.threads,
            "largest_error": worst,
            "read_and_check_seconds": round(read - start, 1),
            "edit_seconds": round(done - read, 1),
            "write_seconds": round(written - done, 1),
            "total_seconds": round(written - start, 1),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
