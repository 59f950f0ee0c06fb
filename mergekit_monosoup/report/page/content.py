"""What stands on the page of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_monosoup.report.figures import module_names
from mergekit_monosoup.report.page.advice import GROUPS, Finding, findings
from mergekit_monosoup.report.page.charts import cosine_data, front_data, map_data, spectra_data
from mergekit_monosoup.report.page.front import Front
from mergekit_monosoup.report.page.public import without_paths
from mergekit_monosoup.report.page.tensors import MOST_ROWS, Table, tensor_table
from mergekit_monosoup.report.page.words import facts, numbers, search_sentence, sentences
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord
from mergekit_monosoup.report.table import natural_key


@dataclass(frozen=True)
class Page:
    """What stands on a page; sections without content are left out.

    Args:
        title, subtitle: what the page is of.
        sentences: what was done.
        numbers: labels and values of the totals.
        findings: what is worth a look; None where nothing was looked for.
        table: of the tensors.
        groups: of tensors, by which the table can be filtered, with their names.
        facts: labels and values of where it comes from: inputs, versions.
        recipe: as others may read it.
        data: what the charts draw, as JSON.
    """

    title: str
    subtitle: str
    sentences: Sequence[str]
    numbers: Sequence[tuple[str, str]]
    table: Table
    findings: Sequence[Finding] | None = None
    groups: dict[str, str] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    recipe: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def merge_page(
    header: ReportHeader, records: Sequence[TensorRecord], title: str, front: Front | None = None
) -> Page:
    """Return the page of a report.

    Args:
        header, records: the report.
        title: name of the model.
        front: the search that chose the recipe, where there was one.
    """
    ordered = sorted(records, key=lambda r: natural_key(r.tensor))
    names = module_names(ordered)
    shown = _most_telling(ordered)
    ahead = header.method == "inspect"
    subtitle = "Analysis of an update" if ahead else f"Merged by {header.method or 'mergekit-monosoup'}"
    if not records:
        subtitle = "Chosen by a search"
    said = sentences(header, ordered, names)
    if front is not None:
        said.append(search_sentence(front))
    sizes = {r.tensor: r.relative_update or 0.0 for r in shown}
    return Page(
        title=title,
        subtitle=subtitle,
        sentences=said,
        numbers=numbers(ordered) if records else (),
        findings=findings(ordered, ahead=ahead) if records else None,
        table=tensor_table(shown, len(ordered)),
        groups={name: said for name, (said, of) in GROUPS.items() if any(of(r) for r in shown)},
        facts=facts(header) if records else (),
        recipe=without_paths(header.configuration) if header.configuration else None,
        data={
            "map": map_data(ordered, names),
            "spectra": (spectra := spectra_data(shown)),
            # Where fine-tuning has changed most.
            "first": max(spectra, key=lambda n: sizes[n]) if spectra else None,
            "cosines": cosine_data(ordered),
            "front": front_data(front) if front is not None else None,
        },
    )


def _most_telling(records: list[TensorRecord]) -> list[TensorRecord]:
    """Return all records, of very many those with the largest updates."""
    if len(records) <= MOST_ROWS:
        return records
    largest = sorted(records, key=lambda r: -(r.relative_update or 0.0))[:MOST_ROWS]
    return sorted(largest, key=lambda r: natural_key(r.tensor))
