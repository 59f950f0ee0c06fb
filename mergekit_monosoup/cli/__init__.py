"""The command `mergekit-monosoup`: one file a sub-command, imported only when it is called."""

from __future__ import annotations

import importlib

import click

# name -> (one line of help, shown without importing the command's file)
_COMMANDS = {
    "merge": "Run a merge recipe: mergekit-yaml with our methods and checks.",
    "complete": "Give a model that stock mergekit merged the files of its fine-tuned checkpoint.",
    "plan": "Check a recipe and say what the merge will do, without reading weights.",
    "inspect": "Analyse fine-tuned checkpoints against their base without writing a model.",
    "report": "Show, sort, filter or compare the reports of merges.",
    "verify": "Check that a merged model is whole and is what its report says.",
    "push": "Check a merged model and upload it to the Hub.",
    "lora": "Edit a LoRA adapter by its factors, without the base model.",
    "extract": "Make an adapter of a full fine-tune: its edited update in a few factors.",
    "align": "Show how the updates of several checkpoints lie to each other.",
    "greedy": "Search the Greedy Soup of several checkpoints by a score on held-out data.",
    "tune": "Search the edit that your own scores prefer, and write its model.",
    "methods": "List the merge methods of this package and their parameters.",
    "doctor": "Say which ways of using this package work here, and why one does not.",
}


class _LazyGroup(click.Group):
    """Import a sub-command's module when it is invoked, so that `--help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:1] == ["merge"]:
            from mergekit_monosoup.cli.early import refuse_unreadable

            refuse_unreadable(args[1:])
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        try:
            module = importlib.import_module(f"mergekit_monosoup.cli.{cmd_name}")
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"{cmd_name} needs the package {error.name!r}, which is not installed here; "
                "`mergekit-monosoup doctor` says what is missing"
            ) from error
        command = getattr(module, cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"mergekit_monosoup.cli.{cmd_name}.{cmd_name} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup)
@click.version_option(package_name="mergekit-monosoup")
def main() -> None:
    """Make fine-tuned checkpoints robust again, without data or retraining.

    Works beside mergekit: the same recipes run under the stock mergekit-yaml.
    """
