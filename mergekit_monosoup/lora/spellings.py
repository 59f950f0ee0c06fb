"""How the files of the trades spell a pair of factors: which key is which part of which module.

The edit needs the two factors of a product and nothing of the model, so the name of a module is taken as it
stands: neither block numbers nor the blocks of a UNet are translated. What tells the trades apart is the end
of a key alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["down", "up", "mid", "alpha", "other"]
Family = Literal["diffusers", "kohya"]

# Ends of keys: (family, down, up). `down` is A `[r, in, k...]` and `up` is B `[out, r, 1...]` in all of them.
_ENDS: tuple[tuple[Family, str, str], ...] = (
    # peft and diffusers of today: UNets, Flux, SD3, Qwen-Image, Wan and their text encoders.
    ("diffusers", ".lora_A.weight", ".lora_B.weight"),
    ("diffusers", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("diffusers", ".lora_embedding_A", ".lora_embedding_B"),
    # diffusers before peft, and what its training scripts still write.
    ("diffusers", ".lora.down.weight", ".lora.up.weight"),
    ("diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    # Attention processors; XLabs has two pairs in one, for the two streams of Flux.
    ("diffusers", "_lora.down.weight", "_lora.up.weight"),
    ("diffusers", "_lora1.down.weight", "_lora1.up.weight"),
    ("diffusers", "_lora2.down.weight", "_lora2.up.weight"),
    # kohya's sd-scripts, LyCORIS' LoCon, OneTrainer, musubi-tuner.
    ("kohya", ".lora_down.weight", ".lora_up.weight"),
)
_MID, _ALPHA = ".lora_mid.weight", ".alpha"
# Ends of keys that make a module something else than a product of two factors, and what that is called.
_OTHERS = (
    (re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\..+)?)$"), "DoRA"),
    (re.compile(r"\.hada_(?:w\d_[ab]|t\d)$"), "LoHa"),
    (re.compile(r"\.lokr_(?:w\d(?:_[ab])?|t\d)$"), "LoKr"),
    (re.compile(r"\.(?:oft_(?:blocks|diag|R\.weight)|oft_r\..+|boft_R.*)$"), "OFT"),
    (re.compile(r"\.(?:[ab][12]\.weight)$"), "GLoRA"),
    (re.compile(r"\.(?:diff|diff_b|set_weight)$"), "a difference stored whole"),
    (re.compile(r"\.(?:w_norm|b_norm)$"), "a norm stored whole"),
    (re.compile(r"\.lora_[AB](?:\.default)?\.bias$|\.lora_(?:up|down)\.bias$"), "a bias of a factor"),
)


@dataclass(frozen=True)
class Spelled:
    """What a key says of itself.

    `module` is what the keys of one pair have in common; `ends` are those of its two factors; `kind` names
    what a key of the part `other` belongs to, empty where nobody knows.
    """

    part: Part
    module: str
    family: Family | None = None
    ends: tuple[str, str] | None = None
    kind: str = ""


def spelled(key: str) -> Spelled:
    """Return which part of which module a key holds.

    The ends are those that `loaders/lora_conversion_utils.py` and `utils/state_dict_utils.py` of diffusers,
    `networks/lora.py` of sd-scripts and `lycoris/modules` read and write.
    """
    part: Part
    for family, down, up in _ENDS:
        for part, end in (("down", down), ("up", up)):
            if key.endswith(end):
                # Numbered pairs are modules of their own.
                number = end.partition(".")[0] if end[5:6].isdigit() else ""
                return Spelled(part, key.removesuffix(end) + number, family, (down, up))
    for part, end in (("mid", _MID), ("alpha", _ALPHA)):
        if key.endswith(end):
            return Spelled(part, key.removesuffix(end), "kohya")
    for pattern, kind in _OTHERS:
        if (match := pattern.search(key)) is not None:
            return Spelled("other", key[: match.start()], kind=kind)
    return Spelled("other", key)
