"""Run the study of real pretrained models, or the part of it that is missing.

python -m benchmarks.real_models [--work FOLDER] [--only NAME] [--short] [--report-only]
"""

from __future__ import annotations

import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from benchmarks.common import machine
from benchmarks.real_models import sources
from benchmarks.real_models.edits import Candidate, Pair, candidates
from benchmarks.real_models.learning import PIECES, Piece, Size, bits, finetune, windows_of
from benchmarks.real_models.report import write_report
from benchmarks.robustness.store import write_json

HERE = Path(__file__).parent
SHORT = Size(length=64, batch=2, windows=2)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".study/real"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Of results and page. [default: this folder]")
@click.option("--only", multiple=True, metavar="NAME", help="These pieces.")
@click.option(
    "--short", is_flag=True, help="A check in minutes that everything runs; its numbers mean little."
)
@click.option("--report-only", is_flag=True, help="Write the page from the results there are.")
def main(work: Path, out: Path | None, only: tuple[str, ...], short: bool, report_only: bool) -> None:
    """Run the pieces that have no result, in the order of their worth, and write the page."""
    out = out or (work / "short" if short else HERE)
    pieces = [piece for piece in PIECES if not only or piece.name in only]
    if short:
        pieces = [Piece(piece.domain, piece.rate, steps=2) for piece in pieces[:1]]
    for piece in [] if report_only else pieces:
        file = out / "results" / f"{piece.name}.json"
        if not is_complete(file):
            run_piece(piece, work, file, SHORT if short else Size(), short)
            write_report(out)
    write_report(out)


def is_complete(file: Path) -> bool:
    """Say whether a result is there with all of its candidates."""
    return file.exists() and bool(json.loads(file.read_text("utf-8"))["complete"])


def run_piece(piece: Piece, work: Path, file: Path, size: Size, short: bool = False) -> None:
    """Fine-tune once and score all candidates; each is in the result as soon as it is scored.

    A piece that was interrupted goes on with the weights that it has kept. Without them (elsewhere) it
    begins anew: the scores of two trainings do not go together.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{piece.name}, {time.monotonic() - began:.0f} s: {text}", err=True)

    folder = sources.base_model(work)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = (piece.domain, sources.VALIDATION, *sources.TEST)
    domains = {name: windows_of(sources.text(name, "test", work), tokenizer, size) for name in names}
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    kept = work / "checkpoints" / f"{piece.name}{'-short' * short}.pt"
    rows: list[dict[str, Any]] = []
    if kept.exists():
        early, tuned = torch.load(kept, weights_only=True)
        if file.exists():
            rows = json.loads(file.read_text("utf-8"))["rows"]
    else:
        training = sources.text(piece.domain, "train", work)[:4_000_000]
        tokens = torch.tensor(tokenizer(training)["input_ids"])
        early, tuned = finetune(model, tokens, piece, size, say)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save((early, tuned), kept)
    trained = time.monotonic() - began
    known = {row["label"] for row in rows}
    content: dict[str, Any] = {
        "piece": vars(piece),
        "short": short,
        "in_distribution": piece.domain,
        "validation": sources.VALIDATION,
        "test": list(sources.TEST),
        "bytes": {name: list(windows.sizes) for name, windows in domains.items()},
        "machine": machine(),
    }

    def keep(complete: bool) -> None:
        seconds = {"training": round(trained), "all": round(time.monotonic() - began)}
        write_json(file, {**content, "complete": complete, "seconds": seconds, "rows": rows})

    ends = [Candidate("base", "ends", lambda: base, 0.0), Candidate("fine-tuned", "ends", lambda: tuned, 1.0)]
    for candidate in chain(ends, candidates(Pair(base, tuned, early), short)):
        if candidate.label in known:
            continue
        model.load_state_dict(candidate.make())
        found = bits(model, domains)
        rows.append(
            {"label": candidate.label, "family": candidate.family, "alpha": candidate.alpha, "bits": found}
        )
        keep(False)
        say(candidate.label)
    keep(True)


if __name__ == "__main__":
    main()
