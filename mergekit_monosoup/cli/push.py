"""`mergekit-monosoup push`."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from mergekit_monosoup.cli.failure import reported_errors


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private where it is created.")
@click.option("--revision", help="Branch to upload to; created where it is missing.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of writing to the branch.")
@click.option("--message", help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="Check the folder and list its files; upload nothing.")
@click.option("-v", "--verbose", is_flag=True, help="One line per tensor as it is checked.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Check the merged model or edited adapter in OUT and upload it to the Hub as REPO_ID.

    The check: config.json loads, the index is complete, every tensor is there and finite. After a lost
    connection, run the same command again; what has arrived is not sent again.
    """
    if create_pr and revision is not None:
        raise click.UsageError("--create-pr opens a pull request on the main branch; leave out --revision")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    log = logging.getLogger(__name__)
    from mergekit_monosoup.checkpoint.adapter_folder import WEIGHTS, is_adapter
    from mergekit_monosoup.checkpoint.output import gigabytes
    from mergekit_monosoup.merging.progress import progress
    from mergekit_monosoup.merging.verify import weight_files
    from mergekit_monosoup.publishing import check_folder, upload

    with reported_errors():
        adapter = is_adapter(folder)
        files = [folder / WEIGHTS] if adapter else weight_files(folder)
        total = sum(file.stat().st_size for file in files if file.is_file())
        with progress(total, "Checking", quiet=quiet, unit="B") as bar:

            def seen(name: str, size: int) -> None:
                bar.advance(name, size)
                log.info("%s: finite", name)

            checked = check_folder(folder, seen)
        click.echo(
            f"{folder}: {checked.tensors} tensors, {checked.parameters:,} parameters, "
            f"{len(checked.files)} files, {gigabytes(checked.bytes)}; complete and finite"
        )
        if dry_run:
            for name in checked.files:
                click.echo(f"  {name}  {gigabytes((folder / name).stat().st_size)}")
            click.echo(f"nothing uploaded to {repo_id} (--dry-run)")
            return
        if quiet:
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
        address = upload(
            folder,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            message=message or ("Upload adapter" if adapter else None),
        )
        click.echo(f"Uploaded to {address}")
