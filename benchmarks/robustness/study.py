"""The jobs of a track, and the result file that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.robustness import methods, work
from benchmarks.robustness.store import Done, Job
from benchmarks.robustness.track import Recipe, Track
from benchmarks.robustness.tracks import code_stamp, open_track, package_stamp, track_stamp

COMPARED = ("MonoSoup", "high only", "low only", "Wise-FT α=0.5")


@dataclass(frozen=True)
class _Costs:
    """Seconds on one thread, roughly: for the progress bar and the order of jobs."""

    pretrain: float
    step: float
    score: float
    merge: float = 1.0
    command: float = 5.0


_COSTS = {
    "language": _Costs(pretrain=600, step=0.2, score=5.5, command=12),
    "vit": _Costs(pretrain=60, step=0.03, score=1),
    "convnet": _Costs(pretrain=60, step=0.03, score=1),
}
_SHORT = {
    "language": _Costs(pretrain=35, step=0.2, score=1, merge=0.4, command=12),
    "vit": _Costs(pretrain=5, step=0.03, score=0.3, merge=0.3),
    "convnet": _Costs(pretrain=5, step=0.03, score=0.3, merge=0.3),
}
_TINY = _Costs(pretrain=1, step=0.01, score=0.2, merge=0.3)


@dataclass
class Plan:
    """The jobs of one track, by what they stand for."""

    track: Track
    short: bool
    base: Job
    tuned: dict[tuple[str, int], Job] = field(default_factory=dict)
    merged: dict[tuple[str, int, str], Job] = field(default_factory=dict)
    pools: dict[str, tuple[list[str], Job, Job]] = field(default_factory=dict)
    compared: dict[tuple[str, int], Job] = field(default_factory=dict)

    def jobs(self) -> list[Job]:
        """Return all jobs."""
        pools = [job for _, *pair in self.pools.values() for job in pair]
        return [self.base, *self.tuned.values(), *self.merged.values(), *pools, *self.compared.values()]


def plan(name: str, short: bool) -> Plan:
    """Return the jobs of a track."""
    track = open_track(name, short)
    own, merging = (
        track_stamp(name, short),
        package_stamp() + code_stamp("methods.py", "commands.py", "work.py"),
    )
    arguments = {"track": name, "short": short}
    costs = (_SHORT if short else _COSTS).get(name, _TINY)
    base = Job(f"{track.name}: pre-train", work.pretrain, arguments, stamp=own, cost=costs.pretrain)
    made = Plan(track, short, base)
    for recipe in track.recipes:
        for seed in track.seeds:
            label = f"{track.name} {_member(recipe, seed)}"
            job = Job(
                f"{label}: fine-tune",
                work.finetune,
                {**arguments, "recipe": recipe.name, "seed": seed},
                {"base": base},
                own,
                costs.step * recipe.steps + costs.score,
            )
            made.tuned[recipe.name, seed] = job
            full = recipe.lora_rank is None
            for method in methods.of_one() if full else methods.of_adapter():
                made.merged[recipe.name, seed, method.label] = Job(
                    f"{label}: {method.label}",
                    work.merge_and_score,
                    {**arguments, "method": method.label, "records": full and method.label == "MonoSoup"},
                    {"base": base, "tuned": job},
                    merging,
                    costs.merge + costs.score,
                )
    _add_pools(made, arguments, merging, costs)
    for recipe in _full(track):
        seed = track.seeds[0]
        made.compared[recipe.name, seed] = Job(
            f"{track.name} {_member(recipe, seed)}: compare by CKA",
            work.similarity,
            {**arguments, "methods": list(COMPARED)},
            {"base": base, "tuned": made.tuned[recipe.name, seed]},
            merging + code_stamp("cka.py"),
            len(COMPARED) * (costs.merge + costs.score / 2),
        )
    return made


def _add_pools(made: Plan, arguments: dict[str, Any], stamp: str, costs: _Costs) -> None:
    track = made.track
    everything = {_member(recipe, seed): (recipe, seed) for recipe in _full(track) for seed in track.seeds}
    pools = {"all": list(everything)}
    pools |= {r.name: [_member(r, seed) for seed in track.seeds] for r in _full(track)}
    pools |= {f"seed {seed}": [_member(r, seed) for r in _full(track)] for seed in track.seeds}
    if made.short:
        # Greedy soup starts a process for every candidate.
        pools = {name: pools[name] for name in (f"seed {track.seeds[0]}",)}
    first: Job | None = None
    for pool, members in pools.items():
        if len(members) < 2:
            continue
        tuned = {}
        for member in members:
            recipe, seed = everything[member]
            tuned[member] = made.tuned[recipe.name, seed]
        merges = len(methods.of_pool()) + len(methods.THRESHOLDS) / 2
        soups = Job(
            f"{track.name} pool {pool}: soups",
            work.pool,
            arguments,
            {"base": made.base, **tuned},
            stamp,
            merges * (costs.merge + costs.score),
        )
        evaluations = 2 * len(members) - 1 if first is None else len(members) - 1
        search = Job(
            f"{track.name} pool {pool}: greedy soup",
            work.greedy,
            arguments,
            {**tuned, **({"earlier": first} if first else {})},
            stamp,
            evaluations * (costs.command + costs.score),
        )
        first = first or search
        made.pools[pool] = (members, soups, search)


def result(made: Plan, done: Mapping[Job, Done]) -> dict[str, Any]:
    """Return the content of the track's result file, but for machine, versions and wall time."""
    track = made.track
    base = done[made.base].value
    return {
        "track": track.name,
        "short": made.short,
        "architecture": track.architecture,
        "measure": track.measure,
        "higher_is_better": track.higher_is_better,
        "validation": track.validation,
        "in_distribution": track.in_distribution,
        "shifts": list(track.shifts),
        "recipes": [asdict(recipe) for recipe in track.recipes],
        "seeds": list(track.seeds),
        "parameters": base["parameters"],
        "data": track.data_card(),
        "base": {"scores": base["scores"]},
        "rows": _rows(made, done),
        "pools": _pools(made, done),
        "lambdas": [
            {"recipe": recipe, "seed": seed, **row}
            for (recipe, seed, _), job in made.merged.items()
            for row in done[job].value.get("lambdas", [])
        ],
        "cka": [
            {"recipe": recipe, "seed": seed, **row}
            for (recipe, seed), job in made.compared.items()
            for row in done[job].value["cka"]
        ],
    }


def _rows(made: Plan, done: Mapping[Job, Done]) -> list[dict[str, Any]]:
    rows = []
    for recipe in made.track.recipes:
        known = methods.of_one() if recipe.lora_rank is None else methods.of_adapter()
        for seed in made.track.seeds:
            place = {"recipe": recipe.name, "seed": seed}
            if recipe.lora_rank is None:
                tuned = done[made.tuned[recipe.name, seed]].value
                row = {"method": "fine-tuned", "family": "fine-tuned", "alpha": None}
                rows.append({**place, **row, "scores": tuned["scores"], "seconds": None})
            for method in known:
                value = done[made.merged[recipe.name, seed, method.label]].value
                what = {"method": method.label, "family": method.family, "alpha": method.alpha}
                rows.append({**place, **what, "scores": value["scores"], "seconds": value["seconds"]})
    return rows


def _pools(made: Plan, done: Mapping[Job, Done]) -> list[dict[str, Any]]:
    pools = []
    for pool, (members, soups, search) in made.pools.items():
        value, found = done[soups].value, done[search].value
        rows = [*value["rows"], {"method": "greedy soup", **found}]
        pools.append(
            {
                "pool": pool,
                "members": members,
                "validation": value["validation"],
                "cosines": value["cosines"],
                "rows": rows,
                "greedy": {"order": value["sfgs"][0]["order"], "taken": found["taken"]},
                "sfgs": value["sfgs"],
            }
        )
    return pools


def _full(track: Track) -> list[Recipe]:
    return [recipe for recipe in track.recipes if recipe.lora_rank is None]


def _member(recipe: Recipe, seed: int) -> str:
    return f"{recipe.name}/{seed}"
