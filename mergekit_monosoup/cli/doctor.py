"""`mergekit-monosoup doctor`: which of the three routes work in this environment, and why not."""

from __future__ import annotations

import json
import platform
import sys
from typing import Any

import click

from mergekit_monosoup.cli import diagnosis
from mergekit_monosoup.cli.installation import OURS, installed_version

_DISTRIBUTIONS = (OURS, "mergekit", "torch", "transformers", "peft", "safetensors")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say which ways of using this package work here, and why one does not.

    Exit status 0 if all of them work, 1 otherwise.
    """
    report = _examined()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    ctx.exit(0 if report["ok"] else 1)


def _examined() -> dict[str, Any]:
    with diagnosis.fresh_interpreter() as probe:
        # Tried here while the other process imports mergekit.
        python = diagnosis.attempt(diagnosis.register_here)
        command = diagnosis.attempt(diagnosis.register_here, diagnosis.import_merge)
        stock = diagnosis.startup_problems(probe) + diagnosis.path_problems()
    routes = [
        ("stock", "mergekit-yaml, mergekit-multi, mergekit-pytorch (start-up hook)", stock),
        ("command", "mergekit-monosoup merge", command),
        ("python", "mergekit_monosoup.register()", python),
    ]
    return {
        "ok": not (stock or command or python),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "versions": {name: installed_version(name) for name in _DISTRIBUTIONS},
        "routes": [
            {
                "name": name,
                "title": title,
                "ok": not problems,
                "problems": [{"reason": p.reason, "remedy": p.remedy} for p in problems],
            }
            for name, title, problems in routes
        ],
        "notes": diagnosis.notes(),
    }


def _show(report: dict[str, Any]) -> None:
    click.echo(f"{'python':<18} {report['python']['version']}  {report['python']['executable']}")
    for name, version in report["versions"].items():
        click.echo(f"{name:<18} {version or 'not installed'}")
    for route in report["routes"]:
        click.echo(f"\n{'works' if route['ok'] else 'FAILS'}  {route['title']}")
        for problem in route["problems"]:
            click.echo(f"       why:    {problem['reason']}\n       remedy: {problem['remedy']}")
    for note in report["notes"]:
        click.echo(f"\nnote:  {note}")
