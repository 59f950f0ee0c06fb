"""`mergekit-monosoup plan`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_monosoup.cli.failure import printable, reported_errors

if TYPE_CHECKING:
    from mergekit_monosoup.planning.plan import Plan


@click.command()
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Output folder to check as well.")
@click.option("--overwrite", is_flag=True, help="The output folder may hold something already.")
@click.option("--allow-crimes", is_flag=True, help="Allow models of different architectures.")
@click.option("--force-base", is_flag=True, help="Plan although the base may be none.")
@click.option(
    "--files-from", metavar="MODEL", help="Model whose files go beside the weights, as `merge` takes it."
)
@click.option("-v", "--verbose", is_flag=True, help="A row for each tensor, not for each kind of them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
def plan(
    ctx: click.Context,
    config_file: Path,
    out: Path | None,
    overwrite: bool,
    allow_crimes: bool,
    force_base: bool,
    files_from: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Check the recipe CONFIG_FILE and say what the merge will do.

    Reads configuration files, tokenizers, the headers of safetensors files and a few entries, to see
    whether the base is the base. That much, and adapters that peft has to place, is downloaded of models
    on the Hub. The exit status is 0 only if the merge would run.
    """
    # Before numpy is imported: the calibration runs on one core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mergekit_monosoup.planning.plain_yaml import read_text
    from mergekit_monosoup.planning.plan import PlanOptions, make_plan

    with reported_errors():
        options = PlanOptions(
            out=out,
            overwrite=overwrite,
            allow_crimes=allow_crimes,
            force_base=force_base,
            files_from=files_from,
        )
        found = make_plan(read_text(config_file), options)
    click.echo(json.dumps(_as_json(found), indent=2) if as_json else _as_text(found, config_file, verbose))
    if found.problems.errors:
        ctx.exit(1)


def _as_json(found: Plan) -> dict[str, Any]:
    return {
        "ok": not found.problems.errors,
        "problems": [
            {"severity": p.severity, "line": p.line, "message": p.message}
            for p in (*found.problems.errors, *found.problems.warnings)
        ],
        "tensors": [
            {
                "tensor": t.tensor,
                "action": t.action,
                "shape": t.shape,
                "dtype": t.dtype,
                "view": t.view or None,
                "why": t.why,
            }
            for t in found.tensors
        ],
        "totals": _totals(found),
        "output_bytes": found.output_bytes,
        "free_bytes": found.free_bytes,
        "estimate": asdict(found.estimate) if found.estimate else None,
    }


def _totals(found: Plan) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for tensor in found.tensors:
        entry = totals.setdefault(tensor.action, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.size
    return totals


def _as_text(found: Plan, config_file: Path, verbose: bool) -> str:
    from mergekit_monosoup.checkpoint.output import gigabytes
    from mergekit_monosoup.planning.folding import Folded, folded
    from mergekit_monosoup.report.table import text_table

    parts = []
    if found.tensors:
        kinds = [Folded(t.tensor, (t,)) for t in found.tensors] if verbose else folded(found.tensors)
        rows = [
            [
                kind.name,
                str(len(kind.tensors)),
                t.action,
                "x".join(map(str, t.shape)),
                t.dtype,
                t.view or "-",
                t.why,
            ]
            for kind in kinds
            for t in kind.tensors[:1]
        ]
        heads = ["tensor", "count", "action", "shape", "dtype", "matrix view", "why"]
        if verbose:
            heads, rows = [h for h in heads if h != "count"], [[*row[:1], *row[2:]] for row in rows]
        parts.append(text_table(heads, rows))
        totals = "\n".join(
            f"{action:<9} {entry['tensors']:>6} tensors {entry['parameters']:>16,} parameters"
            for action, entry in _totals(found).items()
        )
        parts.append(totals)
        room = f"output {gigabytes(found.output_bytes)}; {gigabytes(found.free_bytes)} free on the disk"
        if found.estimate is not None:
            room += (
                f"\nestimated for this machine's processor: {_duration(found.estimate.seconds)}, "
                f"peak memory {gigabytes(found.estimate.peak_bytes)}"
            )
        parts.append(room)
    for kind, problems in (("warning", found.problems.warnings), ("error", found.problems.errors)):
        parts += [f"{kind}: {config_file}: {problem}" for problem in problems]
    parts.append("this merge would fail" if found.problems.errors else "this merge would run")
    return printable("\n\n".join(parts))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
