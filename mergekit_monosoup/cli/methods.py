"""`mergekit-monosoup methods`."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def methods(as_json: bool) -> None:
    """List the merge methods of this package and their parameters."""
    from mergekit_monosoup.registry import our_methods

    specs = [_described(method.spec) for method in our_methods()]
    if as_json:
        click.echo(json.dumps(specs, indent=2))
        return
    for spec in specs:
        click.echo(f"{spec['name']}  ({spec['title']}, {spec['reference']})")
        width = max(len(p["name"]) for p in spec["parameters"])
        for p in spec["parameters"]:
            click.echo(f"  {p['name']:<{width}}  {p['description']}  [default: {p['default']}]")
        click.echo()


def _described(spec: Any) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.pretty_name,
        "reference": spec.reference_url,
        "parameters": [
            {
                "name": p.name,
                "scope": p.scope.value,
                "default": "absent" if p.default is None else p.default,
                "description": p.description,
            }
            for p in spec.parameters
            if not p.name.startswith("_")
        ],
    }
