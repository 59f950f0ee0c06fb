"""Print the validation score of a checkpoint last, for `mergekit-monosoup greedy`.

python -m benchmarks.robustness.score TRACK [--short] CHECKPOINT
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.robustness.tracks import open_track


@click.command()
@click.argument("name", metavar="TRACK")
@click.option("--short", is_flag=True)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
def score(name: str, short: bool, checkpoint: Path) -> None:
    """Score CHECKPOINT."""
    track = open_track(name, short)
    print(track.scores(checkpoint)[track.validation])


if __name__ == "__main__":
    score()
