"""The pages of the reference that come from the code: merge methods, Python functions, schema of reports."""

from __future__ import annotations

from pydantic import BaseModel


def pages() -> dict[str, str]:
    """Return the pages by their path in the site."""
    return {
        "reference/methods.md": methods(),
        "reference/python.md": python(),
        "reference/schema.md": schema(),
    }


def methods() -> str:
    """Return the page of the merge methods, from their specifications."""
    from mergekit_monosoup.registry import our_methods

    text = "# Merge methods\n\nEach parameter takes filters by tensor name and gradients over depth.\n"
    for method in our_methods():
        spec = method.spec
        text += f"\n## `{spec.name}`\n\n{spec.pretty_name}, <{spec.reference_url}>.\n\n"
        text += "| parameter | of | meaning | default |\n|---|---|---|---|\n"
        for p in spec.parameters:
            if not p.name.startswith("_"):
                default = "absent" if p.default is None else f"`{p.default}`"
                text += f"| `{p.name}` | {p.scope.value} | {_cell(p.description or '')} | {default} |\n"
    return text


def python() -> str:
    """Return the page of the public names; mkdocstrings puts their docstrings in."""
    import mergekit_monosoup

    names = [name for name in mergekit_monosoup.__all__ if name != "__version__"]
    text = "# Python\n\nAll of it is imported from `mergekit_monosoup`.\n"
    return text + "".join(f"\n::: {getattr(mergekit_monosoup, n).__module__}.{n}\n" for n in names)


def schema() -> str:
    """Return the page of the lines of a report, from their pydantic models."""
    from mergekit_monosoup.report import schema as module

    models = [
        m
        for m in vars(module).values()
        if isinstance(m, type)
        and issubclass(m, BaseModel)
        and m.__module__ == module.__name__
        and not m.__name__.startswith("_")
    ]
    text = "# Schema of reports\n\n"
    text += f"Version {module.SCHEMA_VERSION}. [Reports](../report.md) explains the fields.\n"
    for model in models:
        definition = model.model_json_schema()
        text += f"\n## {model.__name__}\n\n{(model.__doc__ or '').strip().splitlines()[0]}\n\n"
        text += "| field | type | meaning | required |\n|---|---|---|---|\n"
        required = definition.get("required", [])
        for name, field in definition.get("properties", {}).items():
            told = _cell(field.get("description", ""))
            text += f"| `{name}` | {_type(field)} | {told} | {'yes' if name in required else 'no'} |\n"
    return text


def _type(field: dict[str, object]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "const" in field:
        return f"`{field['const']}`"
    choices = field.get("enum")
    if isinstance(choices, list):
        return ", ".join(f"`{choice}`" for choice in choices)
    either = field.get("anyOf")
    if isinstance(either, list):
        return " or ".join(_type(part) for part in either)
    inner = field.get("items") or field.get("additionalProperties")
    kind = str(field.get("type", "any"))
    return f"{kind} of {_type(inner)}" if isinstance(inner, dict) else kind


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
