"""The methods of the study, each the recipe of a real merge.

For one fine-tuned checkpoint W1 of a base W0, and for a pool of them. Recipes are those of examples/yaml,
in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Recipe = dict[str, Any]

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_ABLATIONS = {
    "rho only": "decay",
    "cos α only": "alignment",
    "uniform mixing": "uniform",
    "high only": "high",
    "low only": "low",
}
_LINES = ((0.1, 0.9), (0.5, 0.5))


@dataclass(frozen=True)
class Method:
    """A merge of one fine-tuned checkpoint, or of a pool of them, with their base.

    `recipe(base, checkpoints)` names the models as mergekit's recipes do; `alpha` is the position on a
    curve.
    """

    label: str
    family: str
    recipe: Callable[[str, Sequence[str]], Recipe]
    alpha: float | None = None


def of_one() -> list[Method]:
    """Return the methods for one fine-tuned checkpoint, the checkpoint itself left out."""
    methods = [
        Method("MonoSoup", "monosoup", monosoup()),
        Method("MonoSoup R=0.8", "monosoup", monosoup(energy=0.8)),
        Method("MonoSoup, written in bfloat16", "monosoup", in_bfloat16),
    ]
    methods += [Method(label, "ablation", monosoup(mixing=name)) for label, name in _ABLATIONS.items()]
    methods += [Method(f"Wise-FT α={a}", "wise-ft", wise_ft(a), a) for a in ALPHAS]
    methods += [Method(f"MonoSoup → Wise-FT α={a}", "monosoup-wise-ft", monosoup(alpha=a), a) for a in ALPHAS]
    methods += [Method(f"LiNeS ({a}, {b})", "lines", lines(a, b)) for a, b in _LINES]
    return methods


def of_adapter() -> list[Method]:
    """Return the methods for `base+adapter`; the first is the adapter merged into the base."""
    return [
        Method("fine-tuned", "fine-tuned", uniform),
        Method("MonoSoup", "lora", monosoup(exact_lora=False)),
        Method("MonoSoup, exact LoRA", "lora", monosoup()),
    ]


def of_pool() -> list[Method]:
    """Return the methods for a pool that need no choice of members."""
    return [
        Method("uniform soup", "soup", uniform),
        Method("Model Stock (mergekit)", "soup", _with_base("model_stock")),
        Method("Model Stock (stable)", "soup", _with_base("model_stock_stable")),
        Method("MonoSoup of the average", "soup", monosoup()),
        Method("MonoSoup R=0.8 of the average", "soup", monosoup(energy=0.8)),
    ]


def monosoup(**parameters: Any) -> Callable[[str, Sequence[str]], Recipe]:
    """MonoSoup and its ablations; of several checkpoints, of the average of their updates."""
    return _with_base("monosoup", **parameters)


def in_bfloat16(base: str, checkpoints: Sequence[str]) -> Recipe:
    """MonoSoup in float32, rounded once to what most models are published in."""
    return {**monosoup()(base, checkpoints), "out_dtype": "bfloat16"}


def wise_ft(alpha: float) -> Callable[[str, Sequence[str]], Recipe]:
    """(1 - alpha) W0 + alpha W1 by mergekit's `linear`."""

    def recipe(base: str, checkpoints: Sequence[str]) -> Recipe:
        (tuned,) = checkpoints
        weights = {base: round(1 - alpha, 6), tuned: alpha}
        models = [_model(model, weight=weight) for model, weight in weights.items()]
        return {"merge_method": "linear", "models": models, "dtype": "float32"}

    return recipe


def lines(a: float, b: float) -> Callable[[str, Sequence[str]], Recipe]:
    """LiNeS: the update of block l of L times a + b l / (L - 1), the rest times a; a gradient in mergekit."""

    def recipe(base: str, checkpoints: Sequence[str]) -> Recipe:
        (tuned,) = checkpoints
        models = [_model(tuned, weight=[a, a + b])]
        return {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "float32"}

    return recipe


def uniform(base: str, checkpoints: Sequence[str]) -> Recipe:
    """Mean of the weights by mergekit's `linear`; the base has no part in it."""
    return {
        "merge_method": "linear",
        "models": [_model(tuned, weight=1.0) for tuned in checkpoints],
        "dtype": "float32",
    }


def sfgs(threshold: float, scores: Sequence[float]) -> Callable[[str, Sequence[str]], Recipe]:
    """Similarity-Filtered Greedy Soup, candidates by descending score."""

    def recipe(base: str, checkpoints: Sequence[str]) -> Recipe:
        models = [_model(tuned, score=score) for tuned, score in zip(checkpoints, scores, strict=True)]
        return {
            "merge_method": "sfgs",
            "base_model": base,
            "models": models,
            "parameters": {"threshold": threshold},
            "dtype": "float32",
        }

    return recipe


def _with_base(method: str, **parameters: Any) -> Callable[[str, Sequence[str]], Recipe]:
    def recipe(base: str, checkpoints: Sequence[str]) -> Recipe:
        models = [{"model": tuned} for tuned in checkpoints]
        head: Recipe = {"merge_method": method, "base_model": base, "models": models}
        return {**head, **({"parameters": parameters} if parameters else {}), "dtype": "float32"}

    return recipe


def _model(name: str | Path, **parameters: Any) -> Recipe:
    return {"model": str(name), "parameters": parameters}
