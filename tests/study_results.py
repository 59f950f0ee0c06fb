"""A result of the robustness study with made-up numbers, in the form that its command writes."""

from __future__ import annotations

import math
from typing import Any

SHIFTS = ("noise", "blur")
RECIPES = ("M-1", "M-2", "M-3")
SEEDS = (0, 1, 2)
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def made_up_result(higher_is_better: bool = True) -> dict[str, Any]:
    members = [f"{recipe}/{seed}" for recipe in RECIPES for seed in SEEDS]

    def scores(identity: float, ood: float, seed: int = 0) -> dict[str, float]:
        wobble = 0.004 * math.sin(7 * seed)
        values = {"validation": identity, "clean": identity + wobble, "noise": ood + wobble, "blur": ood}
        return values if higher_is_better else {name: 3 - 2 * value for name, value in values.items()}

    rows = []
    for number, recipe in enumerate(RECIPES):
        for seed in SEEDS:

            def add(
                method: str,
                family: str,
                identity: float,
                ood: float,
                alpha: float | None = None,
                recipe: str = recipe,
                seed: int = seed,
                drop: float = 0.02 * number,
            ) -> None:
                value = scores(identity - drop / 3, ood - drop, seed)
                rows.append(
                    {
                        "recipe": recipe,
                        "seed": seed,
                        "method": method,
                        "family": family,
                        "alpha": alpha,
                        "scores": value,
                        "seconds": 0.5,
                    }
                )

            add("fine-tuned", "fine-tuned", 0.985, 0.75)
            add("MonoSoup", "monosoup", 0.98, 0.77)
            add("MonoSoup R=0.8", "monosoup", 0.975, 0.79)
            add("high only", "ablation", 0.97, 0.76)
            add("LiNeS (0.1, 0.9)", "lines", 0.96, 0.80)
            add("LiNeS (0.5, 0.5)", "lines", 0.97, 0.79)
            for a in ALPHAS:
                bump = 0.06 * a * (1 - a)
                add(f"Wise-FT α={a}", "wise-ft", 0.94 + 0.045 * a + bump, 0.81 - 0.06 * a + bump, a)
                add(
                    f"MonoSoup → Wise-FT α={a}",
                    "monosoup-wise-ft",
                    0.94 + 0.04 * a + bump,
                    0.81 - 0.04 * a + bump,
                    a,
                )
    pools = [
        {
            "pool": pool,
            "members": inside,
            "validation": dict.fromkeys(inside, 0.98),
            "cosines": [[1.0] * len(inside)] * len(inside),
            "rows": [
                {"method": method, "scores": scores(identity, ood), "taken": inside, "seconds": 0.5}
                for method, identity, ood in (
                    ("best single", 0.985, 0.75),
                    ("uniform soup", 0.982, 0.785),
                    ("greedy soup", 0.987, 0.78),
                    ("Model Stock (mergekit)", 0.975, 0.80),
                    ("Model Stock (stable)", 0.976, 0.802),
                    ("MonoSoup of the average", 0.978, 0.805),
                    ("MonoSoup R=0.8 of the average", 0.974, 0.81),
                )
            ],
            "greedy": {"order": inside, "taken": inside[:2]},
            "sfgs": [
                {
                    "threshold": step / 10,
                    "order": inside,
                    "taken": inside[: max(1, len(inside) - step)],
                    "averages": {},
                    "scores": scores(0.982 - 0.001 * step, 0.785 - 0.003 * step),
                }
                for step in range(10)
            ],
        }
        for pool, inside in {
            "all": members,
            **{recipe: [f"{recipe}/{seed}" for seed in SEEDS] for recipe in RECIPES},
        }.items()
    ]
    lambdas = [
        {
            "recipe": recipe,
            "seed": seed,
            "tensor": f"layers.{block}.{kind}.weight",
            "block": block,
            "kind": kind,
            "lambda_high": 0.9 - 0.02 * block,
            "lambda_low": 0.1 + 0.02 * block + 0.03 * number + 0.01 * math.sin(seed),
        }
        for recipe in RECIPES
        for seed in SEEDS
        for block in range(4)
        for number, kind in enumerate(KINDS)
    ]
    cka = [
        {
            "recipe": recipe,
            "seed": 0,
            "method": method,
            "inputs": inputs,
            "to": to,
            "values": [0.99 - 0.03 * block * (number + 1) / 3 for block in range(4)],
        }
        for recipe in RECIPES
        for number, method in enumerate(
            ("base", "fine-tuned", "MonoSoup", "high only", "low only", "Wise-FT α=0.5")
        )
        for inputs in ("id", "ood")
        for to in ("base", "fine-tuned")
    ]
    return {
        "track": "vit" if higher_is_better else "language",
        "measure": "accuracy" if higher_is_better else "bits per byte",
        "higher_is_better": higher_is_better,
        "validation": "validation",
        "in_distribution": "clean",
        "shifts": list(SHIFTS),
        "recipes": [
            *({"name": recipe, "lora_rank": None} for recipe in RECIPES),
            {"name": "LoRA", "lora_rank": 8},
        ],
        "seeds": list(SEEDS),
        "base": {"scores": scores(0.94, 0.81)},
        "rows": rows,
        "pools": pools,
        "lambdas": lambdas,
        "cka": cka,
    }
