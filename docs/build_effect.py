"""Draw the picture of the README from the result files of the robustness study.

python docs/build_effect.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "robustness" / "results"
FILES = {mode: HERE / "pictures" / f"effect-{mode}.png" for mode in ("light", "dark")}
TRACKS = {"language": ("Qwen3, text", "o"), "vit": ("ViT, digits", "s"), "convnet": ("ConvNeXt, digits", "^")}
# Colours of Okabe and Ito that can be told from both backgrounds.
METHODS = {
    "MonoSoup": ("monosoup", "#0072B2", "#56B4E9"),
    "MonoSoup R=0.8": ("monosoup, energy: 0.8", "#D55E00", "#E69F00"),
    "Wise-FT α=0.5": ("plain Wise-FT 0.5", "#666666", "#999999"),
}


def shares(result: Mapping[str, Any], method: str) -> tuple[float, float]:
    """Return which share of the gain in distribution a method keeps, and of the loss out of it undoes.

    Means over all full fine-tunes: (method - base) / (fine-tuned - base), and (method - fine-tuned) /
    (base - fine-tuned).
    """
    scores = {(row["recipe"], row["seed"], row["method"]): row["scores"] for row in result["rows"]}
    full = [recipe["name"] for recipe in result["recipes"] if recipe["lora_rank"] is None]
    base, inside = result["base"]["scores"], result["in_distribution"]
    runs = [(recipe, seed) for recipe in full for seed in result["seeds"]]

    def mean(name: str, names: list[str]) -> float:
        return fmean(scores[recipe, seed, name][key] for recipe, seed in runs for key in names)

    gained = mean("fine-tuned", [inside]) - base[inside]
    lost = fmean(base[key] for key in result["shifts"]) - mean("fine-tuned", result["shifts"])
    kept = (mean(method, [inside]) - base[inside]) / gained
    undone = (mean(method, result["shifts"]) - mean("fine-tuned", result["shifts"])) / lost
    return kept, undone


def draw(mode: str) -> Figure:
    """Return the picture for a light or a dark page."""
    dark = mode == "dark"
    ink, ground = ("#e6e6e6", "#0d1117") if dark else ("#222222", "#ffffff")
    figure = Figure(figsize=(7.2, 3.5), layout="constrained", facecolor=ground)
    axes = figure.subplots()
    axes.set_facecolor(ground)
    for name, (label, marker) in TRACKS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        for method, (_, light, bright) in METHODS.items():
            kept, undone = shares(result, method)
            axes.plot(100 * kept, 100 * undone, marker, color=bright if dark else light, markersize=10)
        axes.plot([], [], marker, color=ink, linestyle="", label=label)
    for called, light, bright in METHODS.values():
        axes.plot([], [], "-", color=bright if dark else light, linewidth=5, label=called)
    axes.plot([100, 0], [0, 100], "x", color=ink, markersize=9, markeredgewidth=2, clip_on=False)
    axes.annotate("fine-tuned", (100, 0), (-8, 8), textcoords="offset points", ha="right", color=ink)
    axes.annotate("base", (0, 100), (10, -14), textcoords="offset points", color=ink)
    axes.set(xlim=(0, 108), ylim=(0, 118))
    axes.set_xlabel("of what fine-tuning gained, kept (%)", color=ink)
    axes.set_ylabel("of what it cost elsewhere, undone (%)", color=ink)
    axes.tick_params(colors=ink)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(ink)
    axes.legend(loc="lower left", frameon=False, labelcolor=ink)
    return figure


def main() -> None:
    """Write both."""
    for mode, file in FILES.items():
        buffer = io.BytesIO()
        draw(mode).savefig(buffer, dpi=130)
        Image.open(buffer).convert("RGB").quantize(64).save(file, optimize=True)
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
