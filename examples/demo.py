"""The main job from end to end: merge the small pair of examples/models by stock mergekit-yaml, look at it.

    make demo

The merged model and a picture are written below .demo/ (`make clean` removes them). The numbers say what the
commands did to this pair; it is far too small to say how well the method works on real models.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_monosoup import TunedModule, edit_state_dict, edit_update, tune

PAIR = Path("examples") / "models"
BASE, FINETUNED, HELD_OUT = PAIR / "base", PAIR / "finetuned", PAIR / "heldout"
WORK = Path(".demo")
MERGED = WORK / "merged"
MODELS = {"base": BASE, "fine-tuned": FINETUNED, "merged": MERGED}
RECIPE = """\
merge_method: monosoup
base_model: ./examples/models/base
models:
  - model: ./examples/models/finetuned
dtype: bfloat16
"""
SHOWN = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.5.self_attn.q_proj.weight",
    "model.layers.5.mlp.down_proj.weight",
]
IN_DISTRIBUTION = "prose"
SHIFTS = ["python", "headers", "licences", "tables"]
CONTEXT = 128
STRONGER = "energy: 0.8"
WISE_FT = {f"Wise-FT {factor}": factor for factor in (0.3, 0.5, 0.7, 0.9)}
# Bytes of each text: what the search sees, and what it does not.
SEARCHED, COMPARED = slice(0, 4096), slice(4096, 12288)
TRIALS = 6
PICTURE = WORK / "demo.png"


class Cost(NamedTuple):
    """Bits per byte in distribution, and their mean out of it."""

    inside: float
    outside: float


def main() -> None:
    """Run the demonstration in the current directory, the root of the repository."""
    transformers.utils.logging.disable_progress_bar()
    # Models this small gain nothing from a second thread, and lose much by it on a busy machine.
    torch.set_num_threads(1)
    started = time.monotonic()
    heading("1. A base and a fine-tuned checkpoint (Qwen3 architecture, bfloat16)")
    print(
        f"{BASE}: pre-trained on text of five kinds. {FINETUNED}: trained further on\n"
        "English prose alone, at a rate that makes it forget the rest. Their cards say how they were made."
    )
    heading("2. Five lines of YAML and the stock command")
    merge()
    heading("3. What MonoSoup did to a few tensors")
    show_coefficients()
    heading("4. The strength by your own scores: tune")
    tuned = search()
    heading("5. Bits per byte of held-out text (lower is better)")
    costs = show_costs(tuned.module.state_dict())
    draw(costs)
    heading("Your own models")
    print("""\
Put these lines into recipe.yaml, with the checkpoint that the fine-tuning started from as the base:

    merge_method: monosoup
    base_model: Qwen/Qwen3-0.6B-Base
    models:
      - model: suayptalha/Qwen3-0.6B-Math-Expert
    dtype: bfloat16

and run

    mergekit-yaml recipe.yaml ./merged
    hf upload your-name/your-model ./merged
""")
    print(f"Done in {time.monotonic() - started:.0f} s.")


def heading(text: str) -> None:
    """Print a section's title."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def merge() -> None:
    """Run `mergekit-yaml` of this environment as a user would, in a process of its own."""
    WORK.mkdir(exist_ok=True)
    recipe = WORK / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    print(RECIPE)
    command = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    if command is None:
        sys.exit("mergekit-yaml is not in this environment; run `make demo`, which installs it")
    print(f"$ mergekit-yaml {recipe} {MERGED} --quiet", flush=True)
    shutil.rmtree(MERGED, ignore_errors=True)
    began = time.monotonic()
    subprocess.run([command, str(recipe), str(MERGED), "--quiet"], check=True)
    files = ", ".join(sorted(file.name for file in MERGED.iterdir()))
    print(f"\n{MERGED} after {time.monotonic() - began:.0f} s: {files}")


def show_coefficients() -> None:
    """Repeat the edit of a few tensors in Python, and compare with what the command wrote."""
    base, finetuned, merged = (load_file(folder / "model.safetensors") for folder in MODELS.values())
    header = ("tensor", "k of r", "eff. rank", "rho", "cos a", "l_high", "l_low", "as written")
    layout = "{:40} {:>10} {:>9} {:>9} {:>6} {:>7} {:>6} {:>11}"
    print(layout.format(*header))
    for name in SHOWN:
        w0 = base[name].float()
        edited, record = edit_update(finetuned[name].float() - w0)
        same = ((w0 + edited).bfloat16() == merged[name]).float().mean()
        print(
            layout.format(
                name.removeprefix("model."),
                f"{record.k} of {record.rank}",
                f"{record.effective_rank:.1f}",
                f"{record.rho:.2e}",
                f"{record.cos_alpha:.3f}",
                f"{record.lambda_high:.3f}",
                f"{record.lambda_low:.3f}",
                f"{same:.2%}",
            )
        )
    print(
        "\nW = W0 + l_high dW_high + l_low dW_low; l_low = rho + (1 - rho) cos a; l_high = 1 - l_low.\n"
        "As written: the share of entries that the command wrote with exactly these values."
    )


def search() -> TunedModule[PreTrainedModel]:
    """Let a part of the held-out text choose the edit."""
    print(
        f"Two scores: bits per byte of prose (id) and of the other kinds (ood), {SEARCHED.stop} bytes each.\n"
        f"Base, fine-tuned and Wise-FT come first, then {TRIALS} trials; less is better.\n"
    )
    base, finetuned = (load_model(folder) for folder in (BASE, FINETUNED))
    scores = {
        "id": lambda model: fmean(costs_of(model, [IN_DISTRIBUTION], SEARCHED)),
        "ood": lambda model: fmean(costs_of(model, SHIFTS, SEARCHED)),
    }
    tuned = tune(base, finetuned, scores, lower_is_better=True, trials=TRIALS, progress=print)
    print(f"\nChosen, as the nearest to the best of both: {tuned.outcome.best.name}.")
    return tuned


def show_costs(tuned: Mapping[str, Tensor]) -> dict[str, Cost]:
    """Print the cost of what the search has not seen, and what share of it the edits give back."""
    base, finetuned, merged = (load_file(folder / "model.safetensors") for folder in MODELS.values())
    weights = {
        **dict(zip(MODELS, (base, finetuned, merged), strict=True)),
        STRONGER: edit_state_dict(base, finetuned, energy=0.8).weights,
        "tune": tuned,
    }
    for label, factor in WISE_FT.items():
        weights[label] = {name: w0.float().lerp(finetuned[name].float(), factor) for name, w0 in base.items()}
    costs = {}
    print(f"{'':12}{'ID: prose':>10}{'OOD mean':>10} = mean of {', '.join(SHIFTS)}")
    model = load_model(BASE)
    for label, values in weights.items():
        # Tied weights: the files hold the embedding once.
        model.load_state_dict(values, strict=False)
        inside, *outside = costs_of(model, [IN_DISTRIBUTION, *SHIFTS], COMPARED)
        costs[label] = Cost(inside, fmean(outside))
        each = ", ".join(f"{value:.3f}" for value in outside)
        print(f"{label:12}{costs[label].inside:10.3f}{costs[label].outside:10.3f}   ({each})", flush=True)
    print("\nID: the kind of text that it was fine-tuned on. OOD: the other kinds that the base learnt.\n")
    for label, words in {
        "merged": "the automatic rule",
        STRONGER: f"`{STRONGER}`",
        "tune": "tune",
        "Wise-FT 0.5": "plain Wise-FT at 0.5",
    }.items():
        print(in_one_line(words, costs["base"], costs["fine-tuned"], costs[label]))
    return costs


def in_one_line(words: str, base: Cost, finetuned: Cost, edited: Cost) -> str:
    """Say what share of the forgetting is back, and at which share of what was learnt."""
    back = (finetuned.outside - edited.outside) / (finetuned.outside - base.outside)
    lost = (edited.inside - finetuned.inside) / (base.inside - finetuned.inside)
    price = f"{lost:.0%} of what it gained" if lost > 0 else "nothing"
    return (
        f"Of what fine-tuning cost out of distribution {back:.0%} is back by {words}; "
        f"in distribution it cost {price}."
    )


def draw(costs: Mapping[str, Cost]) -> None:
    """Draw the costs: Wise-FT as a curve from base to fine-tuned, the edits as points."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curve = [costs[label] for label in ("base", *WISE_FT, "fine-tuned")]
    axes.plot(
        *zip(*curve, strict=True), "o-", color="0.55", markersize=4, label="Wise-FT, base to fine-tuned"
    )
    for label in ("base", "fine-tuned"):
        axes.annotate(label, costs[label], xytext=(7, 4), textcoords="offset points")
    for label, factor in WISE_FT.items():
        axes.annotate(
            f"{factor}", costs[label], xytext=(-6, -9), textcoords="offset points", ha="right", color="0.4"
        )
    axes.scatter(*costs["merged"], s=60, color="#0072b2", label="automatic rule", zorder=3)
    axes.scatter(*costs[STRONGER], marker="s", s=60, color="#009e73", label=STRONGER, zorder=3)
    # A ring, as tune may choose any of the others.
    axes.scatter(*costs["tune"], s=240, facecolors="none", edgecolors="#d55e00", linewidths=2, label="tune")
    axes.set_xlabel("in distribution: prose, bits per byte (lower is better)")
    axes.set_ylabel("out of distribution, bits per byte (lower is better)")
    axes.margins(0.12)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=150)
    print(f"\nA picture of it: {PICTURE}")


def load_model(folder: Path) -> PreTrainedModel:
    """Load a model of the pair in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def costs_of(model: PreTrainedModel, kinds: Sequence[str], part: slice) -> list[float]:
    """Return the cost of a part of the texts of some kinds."""
    return [bits_per_byte(model, (HELD_OUT / f"{kind}.txt").read_bytes()[part]) for kind in kinds]


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, text: bytes) -> float:
    """Return the mean cost in bits of every byte but the first of each window of CONTEXT bytes."""
    # Token ids are bytes.
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for part in windows.split(16):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel() / math.log(2)


if __name__ == "__main__":
    main()
