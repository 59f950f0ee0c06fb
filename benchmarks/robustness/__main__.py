"""The study, from the text and images that this machine has to RESULTS.md.

python -m benchmarks.robustness [--short]
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

# Before any library reads them: nothing is fetched, and no worker tells of it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import click

from benchmarks.robustness.jobs import JobError, run_jobs
from benchmarks.robustness.store import Store, write_json
from benchmarks.robustness.tracks import TRACKS, package_stamp, track_stamp, versions

HERE = Path(__file__).resolve().parent


@click.command(context_settings={"max_content_width": 100})
@click.option(
    "--short", is_flag=True, help="A check in minutes that everything runs; its numbers mean little."
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE.parent.parent / ".study",
    help="Folder of checkpoints and single results; an interrupted run goes on.  [default: .study]",
)
@click.option("--track", "names", multiple=True, help="Only this one; repeatable.  [default: all]")
@click.option(
    "--jobs", type=click.IntRange(min=0), default=2, show_default=True, help="Processes, of one thread each."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results.  [default: this folder; with --short, the work folder]",
)
@click.option("--report-only", is_flag=True, help="Write figures and RESULTS.md from the result files anew.")
def main(
    short: bool, work: Path, names: tuple[str, ...], jobs: int, out: Path | None, report_only: bool
) -> None:
    """Train, merge by every method, score, and write result files, figures and RESULTS.md."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    out = out or (work / "short" if short else HERE)
    started = time.monotonic()
    if not report_only:
        _run(names or tuple(TRACKS), short, work, jobs, out)
    from benchmarks.robustness.report import write_report

    files = sorted((out / "results").glob("*.json"))
    if not files:
        raise click.ClickException(f"no result files in {out / 'results'}; run without --report-only")
    page = write_report(out)
    click.echo(f"Wrote {page} after {time.monotonic() - started:.0f} s")


def _run(names: tuple[str, ...], short: bool, work: Path, workers: int, out: Path) -> None:
    from benchmarks.common import machine
    from benchmarks.robustness import study

    described = machine()
    started = time.time()
    plans = {name: study.plan(name, short) for name in names}
    every = [job for plan in plans.values() for job in plan.jobs()]
    store = Store(work)
    fresh = sum(store.done(job.key) is None for job in every)
    click.echo(
        f"{len(every)} jobs, {len(every) - fresh} of them done before; work folder {store.root}", err=True
    )
    try:
        done = run_jobs(every, store, workers)
    except JobError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\nInterrupted; the same command goes on from here.", err=True)
        sys.exit(130)
    for name, plan in plans.items():
        content = study.result(plan, done)
        seconds = {
            "work": sum(done[job].seconds for job in plan.jobs()),
            "wall of the whole command": time.time() - started,
            "jobs done in this run, all tracks": fresh,
            "workers": workers,
        }
        code = {"package": package_stamp(), "track": track_stamp(name, short)}
        content |= {"machine": described, "versions": versions(), "code": code, "seconds": seconds}
        write_json(out / "results" / f"{plan.track.name}.json", json.loads(json.dumps(content)))


if __name__ == "__main__":
    main()
