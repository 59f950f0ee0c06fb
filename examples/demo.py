"""The main job from end to end: merge the small pair of examples/models by stock mergekit-yaml, look at it.

    make demo

The merged model is written below .demo/ (`make clean` removes it). The numbers say what the commands did to
this pair; it is far too small to say how well the method works on real models.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_monosoup import edit_state_dict, edit_update

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
    heading("4. Bits per byte of held-out text (lower is better)")
    show_costs()
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


def show_costs() -> None:
    """Print the cost of held-out text under the models, and what share of it the edits give back."""
    costs = {}
    print(f"{'':12}{'ID: prose':>10}{'OOD mean':>10} = mean of {', '.join(SHIFTS)}")
    for label, folder in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        costs[label] = print_costs(label, model)
    base, finetuned = (load_file(folder / "model.safetensors") for folder in (BASE, FINETUNED))
    # Tied weights: the file holds the embedding once.
    model.load_state_dict(edit_state_dict(base, finetuned, energy=0.8).weights, strict=False)
    costs[STRONGER] = print_costs(STRONGER, model)
    print("\nID: the kind of text that it was fine-tuned on. OOD: the other kinds that the base learnt.\n")
    for label, words in (("merged", "the automatic rule"), (STRONGER, f"`{STRONGER}`")):
        print(in_one_line(words, costs["base"], costs["fine-tuned"], costs[label]))


def in_one_line(words: str, base: Cost, finetuned: Cost, edited: Cost) -> str:
    """Say what share of the forgetting is back, and at which share of what was learnt."""
    back = (finetuned.outside - edited.outside) / (finetuned.outside - base.outside)
    lost = (edited.inside - finetuned.inside) / (base.inside - finetuned.inside)
    price = f"{lost:.0%} of what it gained" if lost > 0 else "nothing"
    return (
        f"Of what fine-tuning cost out of distribution {back:.0%} is back by {words}; "
        f"in distribution it cost {price}."
    )


def print_costs(label: str, model: PreTrainedModel) -> Cost:
    """Print the cost of each kind of text in a line."""
    texts = {name: (HELD_OUT / f"{name}.txt").read_bytes() for name in (IN_DISTRIBUTION, *SHIFTS)}
    inside, *outside = (bits_per_byte(model, text) for text in texts.values())
    cost = Cost(inside, sum(outside) / len(outside))
    each = ", ".join(f"{value:.3f}" for value in outside)
    print(f"{label:12}{cost.inside:10.3f}{cost.outside:10.3f}   ({each})", flush=True)
    return cost


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
