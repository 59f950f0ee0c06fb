"""Time and memory of `mergekit-monosoup lora` on one LoRA file of SDXL's shapes, by the real command.

The factors are generated: normally distributed, with a spectrum that decays. Before it is reported, some
modules of the result are compared with a float64 SVD of the product. Memory is the largest resident set of
the command, mapped pages of the file among them; that of a run on a few modules is the interpreter's own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import common
from common import Table, run_child

# Linear layers of SDXL's transformer blocks: (blocks, width), and the width of its text.
BLOCKS, TEXT = ((4, 640), (60, 1280)), 2048
RANK = 64


def main() -> None:
    """Write the file, check, measure, report."""
    options = common.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.safetensors", Path(folder) / "small.safetensors"
        # In processes of their own: what this one holds is counted to its children.
        run_child([sys.executable, __file__, "--generate", large, "4" if options.quick else "1"])
        run_child([sys.executable, __file__, "--generate", small, "64"])
        table = Table(
            "one file, as SDXL's linear layers, float16, rank 64",
            ("what", "seconds", "peak MB", "of the file, without the interpreter's"),
        )
        size = large.stat().st_size
        idle = run_child(_command(small, Path(folder) / "out-small.safetensors"))
        figures = {"size in MB": size / 1e6, "interpreter's memory in MB": idle.peak / 1e6}
        for name, more in (
            ("edit", ()),
            ("--rank 16", ("--rank", "16")),
            ("--rank auto", ("--rank", "auto")),
        ):
            out = Path(folder) / f"out-{len(table.rows)}.safetensors"
            run = run_child(_command(large, out, *more))
            if not more:
                run_child([sys.executable, __file__, "--check", large, out])
            share = (run.peak - idle.peak) / size
            table.add(name, run.seconds, run.peak / 1e6, share)
            figures[f"{name}, seconds"] = run.seconds
            figures[f"{name}, peak memory over the file's size"] = run.peak / size
        common.report("adapter_file", options, [table], figures)


def _command(source: Path, out: Path, *more: str) -> list[str | Path]:
    return [sys.executable, "-m", "mergekit_monosoup", "lora", source, out, "--quiet", *more]


def _generate(path: Path, part: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, RANK)
    tensors = {}
    for count, width in BLOCKS:
        shapes = {f"attn1_to_{x}": (width, width) for x in ("q", "k", "v", "out_0")}
        shapes |= {"attn2_to_q": (width, width), "attn2_to_out_0": (width, width)}
        shapes |= {"attn2_to_k": (width, TEXT), "attn2_to_v": (width, TEXT)}
        shapes |= {"ff_net_0_proj": (8 * width, width), "ff_net_2": (width, 4 * width)}
        for block in range(max(1, count // part)):
            for name, (rows, columns) in shapes.items():
                key = f"lora_unet_blocks_{width}_transformer_blocks_{block}_{name}"
                down = torch.randn(RANK, columns, generator=generator)
                up = torch.randn(rows, RANK, generator=generator) * decay
                tensors[f"{key}.lora_down.weight"] = down.half()
                tensors[f"{key}.lora_up.weight"] = up.half()
                tensors[f"{key}.alpha"] = torch.tensor(float(RANK // 2)).half()
    save_file(tensors, path, metadata={"ss_network_dim": str(RANK)})


def _check(source: Path, out: Path) -> None:
    import torch
    from safetensors import safe_open

    from mergekit_monosoup.spectral import edit_update

    with safe_open(source, "pt") as before, safe_open(out, "pt") as after:
        keys = sorted(key for key in before.keys() if key.endswith("lora_up.weight"))  # noqa: SIM118
        for key in (keys[0], keys[len(keys) // 2], keys[-1]):
            down = before.get_tensor(key.replace("up", "down")).double()
            want, _ = edit_update(before.get_tensor(key).double() @ down, spectrum="svd")
            error = (after.get_tensor(key).double() @ down - want).norm() / want.norm()
            # One rounding to float16.
            assert float(error) < torch.finfo(torch.float16).eps, (key, float(error))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--generate"]:
        _generate(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--check"]:
        _check(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
