"""Write docs/cli.md from the commands themselves: `python docs/build_cli.py`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_monosoup.cli import main

FILE = Path(__file__).with_name("cli.md")
_HEAD = """# Command line

Written by `python docs/build_cli.py` from the commands themselves.

```text
{help}
```
"""
_SECTION = """
## {name}

```text
{help}
```
"""


def page() -> str:
    """Return the page."""
    root = click.Context(main, info_name="mergekit-monosoup", max_content_width=100, terminal_width=100)
    text = _HEAD.format(help=main.get_help(root))
    for name in main.list_commands(root):
        command = main.get_command(root, name)
        if command is None:
            raise click.ClickException(f"the command {name} cannot be imported")
        context = click.Context(
            command, info_name=name, parent=root, max_content_width=100, terminal_width=100
        )
        text += _SECTION.format(name=name, help=command.get_help(context))
    return text


if __name__ == "__main__":
    FILE.write_text(page(), "utf-8")
