"""`mergekit-monosoup greedy`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_monosoup.cli.failure import reported_errors

if TYPE_CHECKING:
    from mergekit_monosoup.search.greedy import GreedySoup


@click.command(cls=PrettyPrintHelp)
@click.argument("checkpoints", nargs=-1, required=True)
@click.option(
    "--eval",
    "command",
    required=True,
    metavar="COMMAND",
    help="Scores the checkpoint in the folder {model} and prints the score last; run without a shell.",
)
@click.option(
    "--out",
    "out_path",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the winning soup.",
)
@click.option("--lower-is-better", is_flag=True, help="Of the score; for losses and perplexities.")
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the scores already known.  [default: OUT.journal.jsonl]",
)
@click.option("--overwrite", is_flag=True, help="Replace what OUT holds once the soup is done.")
@click.option("--resume", is_flag=True, help="Go on with the soup whose writing was interrupted.")
@click.option("--restart", is_flag=True, help="Delete what an interrupted writing has left.")
@add_merge_options
def greedy(
    checkpoints: tuple[str, ...],
    command: str,
    out_path: Path,
    lower_is_better: bool,
    journal: Path | None,
    overwrite: bool,
    resume: bool,
    restart: bool,
    merge_options: MergeOptions,
) -> None:
    """Search the Greedy Soup of CHECKPOINTS by a score on held-out data.

    Ranks the checkpoints by their own score, then adds one after the other to a plain mean and keeps
    it if the mean scores strictly better. Every score goes into the journal at once, under the content
    of what was scored, so that an interrupted search resumes. Works for any model mergekit can merge.
    """
    from mergekit_monosoup.checkpoint.output import left_behind, refuse_occupied
    from mergekit_monosoup.errors import ConfigurationError
    from mergekit_monosoup.merging.run import RunOptions
    from mergekit_monosoup.search.evaluation import Evaluation
    from mergekit_monosoup.search.greedy import greedy_soup
    from mergekit_monosoup.search.journal import Journal
    from mergekit_monosoup.search.kitchen import Kitchen

    if resume and restart:
        raise click.UsageError("--resume goes on with what --restart deletes; pass one of them")
    if len(checkpoints) < 2:
        raise click.UsageError("give at least two checkpoints")
    merge_options.apply_global_options()
    out_path = out_path.resolve()
    quiet = merge_options.quiet
    with reported_errors():
        # Now, not after hours of evaluations.
        refuse_occupied(out_path, overwrite)
        left = None if resume or restart else left_behind(out_path)
        if left is not None:
            raise ConfigurationError(left)
        known = Journal(journal or out_path.with_name(out_path.name + ".journal.jsonl"))
        evaluation = Evaluation(command)
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".greedy-", dir=out_path.parent) as workspace:
            kitchen = Kitchen(
                checkpoints,
                evaluation,
                known,
                merge_options,
                Path(workspace),
                progress=(lambda _: None) if quiet else (lambda line: click.echo(line, err=True)),
            )
            soup = greedy_soup(len(checkpoints), kitchen.score, lower_is_better=lower_is_better)
        kitchen.serve(soup.members, out_path, RunOptions(overwrite, resume, restart))
    if not quiet:
        click.echo(_table(soup, checkpoints))
        count = len(soup.members)
        what = "the best alone" if count == 1 else f"the mean of {count} checkpoints"
        click.echo(f"\nWrote {out_path}, {what}: {soup.score:g}")


def _table(soup: GreedySoup, checkpoints: tuple[str, ...]) -> str:
    rows = [("checkpoints", "score", "")]
    for trial in soup.trials:
        if len(trial.members) == 1:
            outcome = "best alone" if trial.kept else "alone"
        else:
            outcome = "kept" if trial.kept else "left out"
        added = checkpoints[trial.members[-1]]
        name = added if len(trial.members) == 1 else f"soup of {len(trial.members)}, + {added}"
        rows.append((name, f"{trial.score:g}", outcome))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)
