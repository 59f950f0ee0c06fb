"""`mergekit-monosoup tune`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_monosoup.cli.failure import reported_errors
from mergekit_monosoup.cli.html import html_option, write_html
from mergekit_monosoup.cli.on_ray import ray_options
from mergekit_monosoup.cluster.connection import RayOptions

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class _Size(click.ParamType[int]):
    """A number of bytes, as in `20GB`."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b)?\s*", str(value), re.IGNORECASE)
        unit = _UNITS.get((match.group(2) or "").lower()) if match else None
        if match is None or unit is None:
            raise click.BadParameter(f"{value!r} is not a size such as 20GB")
        return int(float(match.group(1)) * unit)


@click.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="NAME=COMMAND",
    help="Scores the checkpoint in the folder {model} and prints the score last; run without a shell. One "
    "for each goal. python:package.module:function is called with the loaded model and its tokenizer.",
)
@click.option(
    "--lm-eval",
    multiple=True,
    metavar="TASK[,TASK]",
    help="Scores by tasks of lm_eval, called in this process: names, or YAML files. "
    "TASK?limit=200&metric=acc_norm&num_fewshot=5&batch_size=8 sets more.",
)
@click.option(
    "--lower-is-better",
    "lower",
    multiple=True,
    is_flag=False,
    flag_value="all",
    metavar="[NAME]",
    help="Of this score; without a name, of all scores.",
)
@click.option(
    "--per-item",
    multiple=True,
    is_flag=False,
    flag_value="all",
    metavar="[NAME]",
    help="This score, without a name every score, is the mean of those of items, printed one "
    "a line. Differences come with intervals then.",
)
@click.option("--trials", type=click.IntRange(min=0), default=20, show_default=True, help="Edits to try.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the search.")
@click.option(
    "--keep",
    multiple=True,
    metavar="NAME>=CHANGE",
    help="Demand on the chosen model: no less than CHANGE over the fine-tuned one, in the score's own "
    "direction (id>=-0.01 allows a loss of 0.01). The best of the other scores is chosen then.",
)
@click.option(
    "--choose",
    type=click.Choice(["nearest", "sum"]),
    default="nearest",
    show_default=True,
    help="Of the front: the point nearest to the best of each score, in units of the distance from base to "
    "fine-tuned, or the best sum, for scores of one unit.",
)
@click.option(
    "--holdout",
    multiple=True,
    metavar="NAME=COMMAND",
    help="Run at the end only, on base, fine-tuned, best Wise-FT and chosen model.",
)
@click.option(
    "--by",
    type=click.Choice(["depth", "module", "layer-group", "fisher"]),
    help="Also search a gradient over depth, factors for attention, MLP and embeddings, or four along the "
    "depth; fisher starts those from what random tokens say of the base.",
)
@click.option(
    "--space",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file of what to search instead, for any merge method.",
)
@click.option(
    "--scratch",
    type=_Size(),
    metavar="SIZE",
    help="Disk for decompositions, such as 20GB.  [default: half of what is free]",
)
@click.option("--resume", is_flag=True, help="Go on with the search in OUT.tune; repeats nothing.")
@click.option("--restart", is_flag=True, help="Delete the search in OUT.tune and begin again.")
@click.option("--overwrite", is_flag=True, help="Replace what OUT holds once the search is done.")
@html_option
@click.option("--force-base", is_flag=True, help="Merge although the values say that the base is none.")
@ray_options
@add_merge_options
def tune(
    recipe: Path,
    out_path: Path,
    scores: tuple[str, ...],
    lm_eval: tuple[str, ...],
    lower: tuple[str, ...],
    per_item: tuple[str, ...],
    trials: int,
    seed: int,
    keep: tuple[str, ...],
    choose: str,
    holdout: tuple[str, ...],
    by: str | None,
    space: Path | None,
    scratch: int | None,
    resume: bool,
    restart: bool,
    overwrite: bool,
    html: Path | None,
    force_base: bool,
    cluster: RayOptions | None,
    merge_options: MergeOptions,
) -> None:
    """Search the edit of RECIPE that your own scores prefer, and write the model to OUT.

    Base, fine-tuned checkpoint and a Wise-FT grid are always among the trials, and may win. Of the front
    between the scores one point is chosen, see --choose and --keep. OUT gets the model that `merge` would
    make of its recipe, and tune.json with all trials. They stay in OUT.tune/study.db too: --resume goes on
    with it, optuna-dashboard shows it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise click.ClickException("tune needs Optuna: pip install mergekit-monosoup[tune]")
    from mergekit_monosoup.merging.run import RunOptions
    from mergekit_monosoup.planning.plain_yaml import load_yaml, read_text
    from mergekit_monosoup.registry import register
    from mergekit_monosoup.search.outcome_file import table, verdict
    from mergekit_monosoup.search.scores import check_names, of_tasks, parse_scores
    from mergekit_monosoup.search.tune import TuneOptions, tune_to_folder

    if resume and restart:
        raise click.UsageError("--resume goes on with what --restart deletes; pass one of them")
    if not scores and not lm_eval:
        raise click.UsageError("give at least one --score NAME=COMMAND or --lm-eval TASK")
    merge_options.apply_global_options()
    quiet = merge_options.quiet
    with reported_errors():
        register()
        parsed = parse_scores((*scores, *of_tasks(lm_eval)), lower, per_item=per_item)
        held = parse_scores(holdout, lower, "--holdout", per_item)
        check_names(lower, (*parsed, *held), "--lower-is-better")
        check_names(per_item, (*parsed, *held), "--per-item")
        ranges = load_yaml(read_text(space))[1] if space is not None else None
        result = tune_to_folder(
            read_text(recipe),
            out_path,
            merge_options,
            TuneOptions(
                scores=parsed,
                trials=trials,
                seed=seed,
                keep=keep,
                choose=choose,  # type: ignore[arg-type]
                holdout=held,
                by=by,  # type: ignore[arg-type]
                space=ranges,
                scratch=scratch,
                resume=resume,
                restart=restart,
                overwrite=overwrite,
            ),
            RunOptions(force_base=force_base, ray=cluster),
            progress=(lambda _: None) if quiet else (lambda line: click.echo(line, err=True)),
        )
        if html is not None:
            from mergekit_monosoup.report.page.folder import page_of

            write_html(page_of(out_path), html, quiet=quiet)
    if not quiet:
        click.echo(table(result.outcome, parsed, result.holdout, result.intervals))
        click.echo(f"\nWrote {out_path}; {verdict(result.outcome)}")
