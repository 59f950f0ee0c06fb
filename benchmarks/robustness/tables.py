"""The tables of RESULTS.md for one track."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.robustness.evidence import pool_agreement
from benchmarks.robustness.markdown import Scale, table
from benchmarks.robustness.summary import (
    Result,
    differences,
    full_recipes,
    id_of,
    labels,
    lora_recipes,
    ood_of,
    rows_of,
)

_FULL = ("fine-tuned", "monosoup", "ablation", "wise-ft", "monosoup-wise-ft", "lines")


def overview(result: Result) -> list[str]:
    """Return every method over all full fine-tunes: ID, mean OOD, and what changes against fine-tuned."""
    methods = ["base", *labels(result, _FULL)]
    return _of_methods(result, methods, full_recipes(result), shifts=False)


def of_recipe(result: Result, recipe: str) -> list[str]:
    """Return every method for one recipe, with each shift."""
    methods = ["base", *labels(result, _FULL, [recipe])]
    return _of_methods(result, methods, [recipe], shifts=True)


def of_adapters(result: Result) -> list[str]:
    """Return the LoRA rows."""
    recipes = lora_recipes(result)
    methods = ["base", *labels(result, ("fine-tuned", "lora"), recipes)]
    return _of_methods(result, methods, recipes, shifts=True)


def _of_methods(result: Result, methods: Sequence[str], recipes: Sequence[str], *, shifts: bool) -> list[str]:
    scale = Scale(result)
    columns = ["method", "ID", "mean OOD", "ID, change", "mean OOD, change"]
    columns += result["shifts"] if shifts else []
    body = []
    for method in methods:
        scores = [row["scores"] for row in rows_of(result, method, recipes)]
        # The base is one checkpoint, whatever the seed.
        scores = scores[:1] if method == "base" else scores
        cells = [method]
        cells.append(scale.plain([id_of(result, s) for s in scores]))
        cells.append(scale.plain([ood_of(result, s) for s in scores]))
        changes = differences(result, method, "fine-tuned", recipes)
        if method == "fine-tuned":
            cells += ["", ""]
        else:
            cells += [scale.signed([change[axis] for change in changes]) for axis in (0, 1)]
        cells += [scale.plain([s[shift] for s in scores]) for shift in result["shifts"]] if shifts else []
        body.append(cells)
    return table(columns, body)


def curves(result: Result) -> list[str]:
    """Return Wise-FT and MonoSoup then Wise-FT by alpha, over all full fine-tunes."""
    scale = Scale(result)
    columns = [
        "α",
        "ID, Wise-FT",
        "mean OOD, Wise-FT",
        "ID, MonoSoup → Wise-FT",
        "mean OOD, MonoSoup → Wise-FT",
    ]
    inner = sorted({row["alpha"] for row in result["rows"] if row["family"] == "wise-ft"})
    names = {0.0: ("base", "base"), 1.0: ("fine-tuned", "MonoSoup")}
    names |= {a: (f"Wise-FT α={a}", f"MonoSoup → Wise-FT α={a}") for a in inner}
    body = []
    for alpha in sorted(names):
        cells = [f"{alpha:g}"]
        for method in names[alpha]:
            scores = [row["scores"] for row in rows_of(result, method)]
            scores = scores[:1] if method == "base" else scores
            cells += [scale.plain([of(result, s) for s in scores]) for of in (id_of, ood_of)]
        body.append(cells)
    return table(columns, body)


def soups_over_seeds(result: Result) -> list[str]:
    """Return every soup over the pools of one seed each; nothing where there is but one such pool."""
    named = {f"seed {seed}" for seed in result["seeds"]}
    found = [pool for pool in result["pools"] if pool["pool"] in named]
    if len(found) < 2:
        return []
    scale = Scale(result)
    by_method: dict[str, list[Result]] = {}
    for pool in found:
        by_threshold = [{**d, "method": f"SFGS, threshold {d['threshold']:g}"} for d in pool["sfgs"]]
        for row in [*pool["rows"], *by_threshold]:
            by_method.setdefault(row["method"], []).append(row)
    single = [row["scores"] for row in by_method["best single"]]
    body = []
    for method, rows in by_method.items():
        scores = [row["scores"] for row in rows]
        cells = [method, ", ".join(str(len(row["taken"])) for row in rows)]
        cells += [scale.plain([of(result, s) for s in scores]) for of in (id_of, ood_of)]
        for of in (id_of, ood_of):
            pairs = zip(scores, single, strict=True)
            less = [of(result, mine) - of(result, best) for mine, best in pairs]
            cells.append("" if method == "best single" else scale.signed(less))
        body.append(cells)
    return table(["soup", "members", "ID", "mean OOD", "ID, change", "mean OOD, change"], body)


def pools(result: Result) -> list[str]:
    """Return all soups of all pools."""
    scale = Scale(result)
    lines = []
    for pool in result["pools"]:
        which = "" if pool["pool"] == "all" else f" of {pool['pool']}"
        lines += ["", f"Pool: all {len(pool['members'])} full fine-tunes{which}.", ""]
        columns = ["soup", "members", "validation", "ID", "mean OOD", *result["shifts"]]
        rows = [*pool["rows"], *_soups_by_sfgs(pool)]
        body = []
        for row in rows:
            scores = row["scores"]
            values = [scores[result["validation"]], id_of(result, scores), ood_of(result, scores)]
            values += [scores[shift] for shift in result["shifts"]]
            body.append([row["method"], len(row["taken"]), *(scale.plain([v]) for v in values)])
        lines += table(columns, body)
    return lines


def _soups_by_sfgs(pool: Result) -> list[Result]:
    """Return one row for each soup that sfgs makes, with the thresholds that lead to it."""
    by_members: dict[tuple[str, ...], Result] = {}
    for decision in pool["sfgs"]:
        key = tuple(sorted(decision["taken"]))
        row = by_members.setdefault(key, {**decision, "thresholds": []})
        row["thresholds"].append(decision["threshold"])
    return [
        {**row, "method": f"SFGS, threshold {', '.join(f'{t:g}' for t in row['thresholds'])}"}
        for row in by_members.values()
    ]


def decisions(result: Result) -> list[str]:
    """Return, for each pool, in which order candidates came and who kept which."""
    scale = Scale(result)
    lines = []
    for pool in result["pools"]:
        lines += ["", f"Pool {pool['pool']}: greedy soup keeps {', '.join(pool['greedy']['taken'])}.", ""]
        thresholds = [f"{d['threshold']:g}" for d in pool["sfgs"]]
        columns = ["candidate", "validation", "cosine to the soup at 0", "greedy", *thresholds]
        body = []
        for member in pool["greedy"]["order"]:
            cosine = pool["sfgs"][0]["averages"].get(member)
            marks = [_mark(member in d["taken"]) for d in pool["sfgs"]]
            validation = scale.plain([pool["validation"][member]])
            shown = "first" if cosine is None else f"{cosine:.3f}"
            body.append([member, validation, shown, _mark(member in pool["greedy"]["taken"]), *marks])
        agreed = [f"{same} of {asked}" for same, asked in pool_agreement(pool)]
        body.append(["decisions as greedy soup", "", "", "", *agreed])
        lines += table(columns, body)
    return lines


def _mark(taken: bool) -> str:
    return "kept" if taken else "–"
