"""Pages for the tests: records as a merge of a model with layers writes them, with some oddities."""

from __future__ import annotations

import math

from mergekit_monosoup.report.page.content import merge_page
from mergekit_monosoup.report.page.front import Front
from mergekit_monosoup.report.schema import InputModel, ReportHeader, SpectrumCurve, TensorRecord

MODULES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "mlp.up_proj": (192, 64),
    "mlp.down_proj": (64, 192),
    "input_layernorm": (64,),
}
# Names that would be markup, end a script, or follow a path, were they not escaped.
HOSTILE = (
    "<img src=x onerror=alert(1)>.weight",
    "</script><script>alert(2)</script>.weight",
    "'\"&lt;b&gt;\u2028{{ 7 * 7 }}.weight",
    "constructor",
    "__proto__",
)


def record(name, shape=(64, 64), layer=0, *, points=48, **known):
    """Record of one tensor; a matrix has a spectrum and a second split."""
    fields = {"tensor": name, "shape": shape, "dtype": "bfloat16", "relative_update": 0.01 * (1 + layer)}
    if len(shape) < 2:
        return TensorRecord(**fields, action="kept", reason="not a matrix", **known)
    r = min(shape)
    index = sorted({1 + i * (r - 1) // (points - 1) for i in range(points)})
    energy = [(i / r) ** 0.5 for i in index]
    fields |= {
        "action": "edited",
        "method": "inspect",
        "matrices": 1,
        "r": r,
        "k": float(r // 2),
        "p_k": 0.9,
        "rho": 0.01,
        "cos_alpha": 0.3,
        "lambda_low": 0.1 + layer / 100,
        "lambda_high": 0.9 - layer / 100,
        "rounding_share": 0.1,
        "edit_survival": 0.99,
        "spectrum": SpectrumCurve(index=index, value=[1 / math.sqrt(i) for i in index], energy=energy),
        "sweep": {"0.8": {"k": max(1.0, r // 4), "p_k": 0.8, "lambda_high": 0.6}},
    }
    return TensorRecord(**(fields | known))


def records(layers=4, modules=MODULES, **how):
    """Records of a whole model."""
    found = [record("model.embed_tokens.weight", modules.get("embed_tokens", (256, 64)), **how)]
    for layer in range(layers):
        for module, shape in modules.items():
            known = {}
            if (layer, module) == (1, "mlp.up_proj"):
                known = {"rounding_share": 0.5}
            if (layer, module) == (2, "mlp.up_proj"):
                known = {"k": float(min(shape)), "cos_alpha": 0.0, "lambda_high": 1.0, "lambda_low": 0.0}
            found.append(record(f"model.layers.{layer}.{module}.weight", shape, layer, **known, **how))
    return found


def header(**known):
    """Header of a report whose models lie in somebody's folders."""
    inputs = (
        InputModel(model="/home/jane.doe/models/base-1b", role="base"),
        InputModel(model="org/tuned", role="finetuned", revision="0123abcd"),
    )
    fields = {"created": "2026-01-02T03:04:05+00:00", "versions": {"python": "3.11"}, "inputs": inputs}
    return ReportHeader(**({"method": "monosoup", **fields} | known))


def front():
    """The trials of a search by two scores."""
    trials = [
        {"name": "base", "scores": {"id": 1.6, "ood": 1.3}, "wise_ft": 0.0},
        {"name": "fine-tuned", "scores": {"id": 1.2, "ood": 1.5}, "wise_ft": 1.0, "on_front": True},
        {"name": "Wise-FT 0.5", "scores": {"id": 1.35, "ood": 1.28}, "wise_ft": 0.5, "on_front": True},
        {
            "name": "split: energy <0.8>",
            "parameters": {"split": "energy"},
            "scores": {"id": 1.25, "ood": 1.26},
            "on_front": True,
            "holdout": {"news": 1.4},
        },
    ]
    scores = [{"name": "id", "lower_is_better": True}, {"name": "ood", "lower_is_better": True}]
    return Front.model_validate({"scores": scores, "trials": trials, "chosen": 3})


def full_page(extra=()):
    """A page with all its sections but that of `align`."""
    cosines = {"one-two": 0.5}
    held = [*records(), *(record(name) for name in extra)]
    held[1] = held[1].model_copy(update={"cosines": cosines})
    return merge_page(header(configuration="merge_method: monosoup\n"), held, "my <b>model</b>", front())
