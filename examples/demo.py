"""The main job from end to end: train a small pair, merge it with stock mergekit-yaml, look at it.

    make demo

Everything is written below .demo/ (`make clean` removes it). The numbers it prints say what the
commands did to this pair; the pair is far too small to say how well the method works on real models.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from small_models import Corpus, bits_per_byte, code, english, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_monosoup import edit_update

WORK = Path(".demo")
BASE, FINETUNED, MERGED = WORK / "base", WORK / "finetuned", WORK / "merged"
RECIPE = """\
merge_method: monosoup
base_model: ./.demo/base
models:
  - model: ./.demo/finetuned
dtype: bfloat16
"""
SHOWN = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
]
PROMPT = "The value of "


def main() -> None:
    """Run the demonstration in the current directory."""
    transformers.utils.logging.disable_progress_bar()
    # Models this small gain nothing from a second thread, and lose much by it on a busy machine.
    torch.set_num_threads(1)
    started = time.monotonic()
    heading("1. A base and a fine-tuned checkpoint (Qwen3 architecture, bfloat16)")
    prepare_pair()
    heading("2. Five lines of YAML and the stock command")
    merge()
    heading("3. What MonoSoup did to a few tensors")
    show_coefficients()
    heading("4. Held-out bits per byte (lower is better)")
    show_losses(english(), code())
    heading("5. The result writes")
    show_sample()
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


def prepare_pair() -> None:
    """Train the pair, unless an earlier run has left it."""
    if (FINETUNED / "tokenizer.json").exists():
        print(f"{BASE} and {FINETUNED} are there from an earlier run.")
        return
    print(
        "Training both from scratch on text of this Python's standard library (half a minute or\n"
        "so): the base on source code and English, the fine-tuned one on English alone."
    )

    def progress(name: str, step: int, bits: float) -> None:
        if step % 50 == 0:
            print(f"  {name:10}  step {step:3}  {bits:.2f} bits per byte", flush=True)

    write_pair(BASE, FINETUNED, progress)


def merge() -> None:
    """Run `mergekit-yaml` of this environment as a user would, in a process of its own."""
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
    base, finetuned, merged = (
        load_file(folder / "model.safetensors") for folder in (BASE, FINETUNED, MERGED)
    )
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


def show_losses(*corpora: Corpus) -> None:
    """Print the cost of held-out text under the three models."""
    print(f"{'':12}{'English':>10}{'code':>10}")
    for folder in (BASE, FINETUNED, MERGED):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        costs = "".join(f"{bits_per_byte(model, corpus):10.3f}" for corpus in corpora)
        print(f"{folder.name:12}{costs}")
    print("\nFine-tuned on English alone; code is what it was not fine-tuned on.")


def show_sample() -> None:
    """Let the merged model continue a prompt."""
    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    transformers.set_seed(0)
    output = model.generate(**tokens, max_new_tokens=120, do_sample=True, temperature=0.5)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
