"""Write the small pair of `make demo` from the study: its base, and an over-specialised fine-tune.

    python -m benchmarks.robustness.demo_pair

Takes both from the study's work folder, or trains them as the study does. Writes them in bfloat16, with
model cards and excerpts of the held-out text, below examples/models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click

from benchmarks.robustness.jobs import run_jobs
from benchmarks.robustness.markdown import wrapped
from benchmarks.robustness.store import Store
from benchmarks.robustness.study import plan
from benchmarks.robustness.track import Recipe
from benchmarks.robustness.tracks import versions

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE, SEED = "M-3", 0
HELD_OUT_BYTES = 20_000
EXCERPT_BYTES = 1_500
# Other people's e-mail addresses need not travel with the models.
ADDRESS = re.compile(rb"[\w.+-]+@[\w-]+\.\w")
LICENCES = {
    "prose": "docstrings of Python's standard library and topics of its help (PSF-2.0), and docstrings of "
    "NumPy, SciPy, scikit-learn and PyTorch (BSD-3-Clause)",
    "python": "source code of Python's standard library without its docstrings (PSF-2.0)",
    "headers": "C and C++ headers of PyTorch (BSD-3-Clause) and of Python (PSF-2.0)",
    "licences": "licence texts themselves, quoted in part",
    "tables": "breast cancer, digits, iris and wine of the UCI Machine Learning Repository (CC BY 4.0), as "
    "scikit-learn (BSD-3-Clause) brings them along",
}


@click.command(context_settings={"max_content_width": 100})
@click.option("--short", is_flag=True, help="Take the models of the study's short form, to try this command.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / ".study",
    help="The study's work folder.  [default: .study]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "examples" / "models",
    help="Where to write the pair.  [default: examples/models]",
)
def main(short: bool, work: Path, out: Path) -> None:
    """Write base, fine-tune and held-out text below OUT."""
    import torch

    from benchmarks.robustness.language import LanguageTrack

    # As the study's workers: another number of threads rounds otherwise.
    torch.set_num_threads(1)
    made = plan("language", short)
    jobs = [made.base, made.tuned[RECIPE, SEED]]
    base, tuned = (run_jobs(jobs, Store(work), workers=0)[job] for job in jobs)
    track = LanguageTrack(short)
    data = track.data_card()
    recipe = {recipe.name: recipe for recipe in track.recipes}[RECIPE]
    write_model(base.folder, out / "base", base_card(track.size.pretraining, data, base.value["scores"]))
    write_model(tuned.folder, out / "finetuned", finetuned_card(recipe, data, tuned.value["scores"]))
    write_held_out(out / "heldout", data)
    click.echo(f"Wrote {out}")


def write_model(checkpoint: Path, out: Path, card: str) -> None:
    """Write a checkpoint in bfloat16, with its tokenizer and a model card."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(out, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def base_card(pretraining: Recipe, data: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """Return the base's model card."""
    from benchmarks.robustness import language

    shares = ", ".join(f"{name} {share:.0%}" for name, share in data["mixture"].items())
    return _card(
        "A small byte-level base model",
        f"""
{language.LanguageTrack.architecture}. Pre-trained from scratch, in minutes on a CPU, by this repository's
robustness study (`python -m benchmarks.robustness.demo_pair`) for its demonstration; of no other use.

Training text, in shares of the batches: {shares}.
{pretraining.steps} steps of {language.BATCH} windows of {language.CONTEXT} bytes, AdamW, learning rate
{pretraining.learning_rate:g} ({pretraining.schedule}), weight decay {pretraining.weight_decay:g}, seed
{language.PRETRAINING_SEED}.""",
        data["domains"],
        scores,
    )


def finetuned_card(recipe: Recipe, data: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """Return the fine-tuned model's card."""
    from benchmarks.robustness import language

    return _card(
        "The same model, over-specialised in English prose",
        f"""\
`../base`, all of its weights trained further on the prose of its training text alone, by recipe
{recipe.name} of this repository's robustness study: {recipe.steps} steps of {language.BATCH} windows
of {language.CONTEXT} bytes, AdamW, learning rate {recipe.learning_rate:g} ({recipe.schedule}), seed
{SEED}. The rate is meant to make it forget the other domains.""",
        {language.FINE_TUNED_ON: data["domains"][language.FINE_TUNED_ON]},
        scores,
    )


def _card(
    title: str, body: str, domains: Mapping[str, Mapping[str, Any]], scores: Mapping[str, float]
) -> str:
    # Licences come from every package of the machine: too long a list for a card.
    named = (card["sources"] for name, card in domains.items() if name != "licences")
    sources = sorted({source for some in named for source in some})
    digests = "\n".join(
        f"| {name} | {card['splits']['train']['bytes']} | `{card['splits']['train']['sha256'][:16]}` |"
        for name, card in domains.items()
    )
    measured = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    origin = (
        f"The text is what the machine had of {', '.join(sources)}"
        f"{' and the licence texts of its packages' if 'licences' in domains else ''}. "
        f"Made with {made_with}."
    )
    return f"""\
---
language: en
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags:
- byte-level
- demonstration
---

# {title}

{_wrapped(body)}

Trained in float32 and rounded to bfloat16. A token id is the value of a byte; 0 ends a text.

| training text | bytes | SHA-256, first 16 digits |
|---|---|---|
{digests}

Held-out text, bits per byte in float32 before rounding, as the study measures it:

| text | bits per byte |
|---|---|
{measured}

{_wrapped(origin)}

## Licence

Weights and card: Apache-2.0, as this repository. The training text is not part of it; it is under the
licences of its packages, named in `../heldout/README.md`.
"""


def _wrapped(text: str) -> str:
    return "\n\n".join(map(wrapped, text.strip().split("\n\n")))


def write_held_out(out: Path, data: Mapping[str, Any]) -> None:
    """Write excerpts of the test split of every domain, and where they are from."""
    from benchmarks.robustness.text import corpus

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = []
    for name in data["domains"]:
        text = excerpts(corpus(name).splits["test"], HELD_OUT_BYTES, EXCERPT_BYTES)
        (out / f"{name}.txt").write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        rows.append(f"| `{name}.txt` | {len(text)} | `{digest[:16]}` | {LICENCES[name]} |")
    sources = {name: card["sources"] for name, card in data["domains"].items() if name != "licences"}
    (out / "README.md").write_text(
        f"""\
# Held-out text

Excerpts of the study's test splits, the beginnings of documents, for `make demo`: none of it was trained on.
Lines with e-mail addresses are left out.
`prose.txt` is in distribution for the fine-tuned model; the others are not.

| file | bytes | SHA-256, first 16 digits | what it is, and its licence |
|---|---|---|---|
{chr(10).join(rows)}

Versions of the sources:

```json
{json.dumps(sources, indent=1)}
```
""",
        encoding="utf-8",
    )


def excerpts(text: bytes, size: int, longest: int) -> bytes:
    """Return the beginnings of documents in whole lines, up to about `size` bytes.

    Of at most `longest` bytes each; where that does not come to `size`, twice as long, and so on.
    """
    from benchmarks.robustness.text import END_OF_DOCUMENT

    documents = text.split(END_OF_DOCUMENT)
    pieces = [_beginning(document, longest) for document in documents]
    if sum(map(len, pieces)) < size and longest < max(map(len, documents)):
        return excerpts(text, size, 2 * longest)
    chosen: list[bytes] = []
    for piece in filter(None, pieces):
        if sum(map(len, chosen)) < size:
            chosen.append(piece)
    return b"\n\n".join(chosen) + b"\n"


def _beginning(document: bytes, longest: int) -> bytes:
    document = b"".join(line for line in document.splitlines(keepends=True) if not ADDRESS.search(line))
    if len(document) > longest:
        document = document[:longest]
        document = document[: document.rfind(b"\n") + 1]
    return document.strip(b"\n")


if __name__ == "__main__":
    main()
