"""What `mergekit-monosoup extract` makes of a fine-tune at several ranks: size, rank and error.

    python benchmarks/extract.py [--base BASE --finetuned FINETUNED --name NAME] [--json FILE]

Nothing is counted before one adapter, merged back by peft, has been compared with the edited checkpoint of
`mergekit-monosoup merge`: the difference has to be what the command states.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import common
from common import Table, run_child

MODELS = common.ROOT / "examples" / "models"
ASKED = (
    ("--rank", "8"),
    ("--rank", "32"),
    ("--rank", "0.9"),
    ("--rank", "auto"),
    ("--rank", "auto", "--plain"),
    ("--rank", "auto", "--factors-only"),
)


def main() -> None:
    """Extract, check, report."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--base", default=str(MODELS / "base"))
    parser.add_argument("--finetuned", default=str(MODELS / "finetuned"))
    parser.add_argument("--name", default="the example models", help="what the table calls them")
    options = parser.parse_args()
    size = sum(f.stat().st_size for f in Path(options.finetuned).glob("*.safetensors"))
    table = Table(
        f"adapters of {options.name}; the fine-tune itself takes {size / 1e6:.1f} MB",
        ("asked", "mean rank", "largest", "factors MB", "whole MB", "error", "error of factors", "seconds"),
    )
    figures: dict[str, float] = {"fine-tune in MB": size / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        for arguments in ASKED[:1] if options.quick else ASKED:
            out = Path(folder) / "-".join(arguments).replace("--", "")
            command = [sys.executable, "-m", "mergekit_monosoup", "extract", options.base, options.finetuned]
            run = run_child([*command, out, *arguments])
            asked = " ".join(arguments)
            record = json.loads((out / "monosoup_edit.json").read_text())
            if asked == "--rank 8":
                run_child([sys.executable, __file__, "--check", options.base, options.finetuned, out])
                figures["rounding in the updates, share of their squared norm"] = record["noise"]
                figures["the same, share of the norm"] = record["noise"] ** 0.5
            factored = [t for t in record["tensors"] if t["outcome"] == "factors"]
            ranks = [t["rank"] for t in factored]
            lost = sum((t["error"] * t["norm"]) ** 2 for t in factored) ** 0.5
            norm = sum(t["norm"] ** 2 for t in factored) ** 0.5
            factors, whole = _sizes(out)
            mean = sum(ranks) / len(ranks)
            table.add(
                asked, mean, max(ranks), factors / 1e6, whole / 1e6, record["error"], lost / norm, run.seconds
            )
    common.report("extract", options, [table], figures)


def _sizes(folder: Path) -> tuple[int, int]:
    with (folder / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = [0, 0]
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            sizes[".lora_" not in name] += end - begin
    return sizes[0], sizes[1]


def _check(base: str, finetuned: str, adapter: Path) -> None:
    import peft
    import torch
    import transformers

    from mergekit_monosoup.spectral import edit_update

    def opened(name: str) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    w0, w1 = opened(base).state_dict(), opened(finetuned).state_dict()
    merged = peft.PeftModel.from_pretrained(opened(base), adapter).merge_and_unload().state_dict()
    told = json.loads((adapter / "monosoup_edit.json").read_text())["tensors"]
    for tensor in [t for t in told if t["outcome"] == "factors"][::17]:
        name = tensor["tensor"]
        want, _ = edit_update((w1[name] - w0[name]).double(), spectrum="svd")
        error = float((merged[name].double() - w0[name].double() - want).norm() / want.norm())
        assert abs(error - tensor["error"]) < 1e-3 + 0.01 * tensor["error"], (name, error, tensor["error"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        _check(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
