"""`mergekit-monosoup verify`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_monosoup.cli.failure import reported_errors


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compute N random tensors again from the inputs.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones.")
@click.option("--quiet", is_flag=True, help="No progress bar; nothing is printed where all is well.")
def verify(folder: Path, recompute: int | None, seed: int, quiet: bool) -> None:
    """Check that the merged model in OUT is whole and is what its report says.

    Config and index, every file and tensor, no stray shard, all values finite; the SHA-256 of each tensor is
    compared with monosoup_report.jsonl where that has it. Each problem is a line, and the exit status is 1.
    --recompute needs the inputs where the recipe (mergekit_config.yml) names them.
    """
    from mergekit_monosoup.checkpoint.output import gigabytes
    from mergekit_monosoup.merging.progress import progress
    from mergekit_monosoup.merging.verify import verify_folder, weight_files

    with reported_errors():
        total = sum(file.stat().st_size for file in weight_files(folder))
        with progress(total, "Verifying", quiet=quiet, unit="B") as bar:
            if recompute is None:
                found = verify_folder(folder, seen=bar.advance)
            else:
                from mergekit_monosoup.merging.recompute import recomputing
                from mergekit_monosoup.registry import register

                register()
                with recomputing(folder) as again:
                    found = verify_folder(
                        folder, recompute=again, count=recompute, seed=seed, seen=bar.advance
                    )
    for problem in found.problems:
        click.echo(problem, err=True)
    if found.problems:
        raise click.exceptions.Exit(1)
    if not quiet:
        compared = f"{found.hashed} of them" if found.hashed < found.tensors else "all of them"
        anew = f"; {found.recomputed} computed again, to the same bytes" if found.recomputed else ""
        hashes = f"; the hashes of {compared} are those of the report" if found.hashed else ""
        click.echo(
            f"{folder}: {found.tensors} tensors, {found.parameters:,} parameters, {gigabytes(total)}; "
            f"complete and finite{hashes}{anew}"
        )
