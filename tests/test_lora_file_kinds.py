"""LoRA files by the documented names of kohya, LyCORIS, OneTrainer and XLabs; and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_edits import edit, refuse, truncated
from oracle import monosoup_update
from safetensors.torch import load_file, save_file
from torch import Tensor

# Trade: (down, up) by their ends, and modules with the sides of their factors. The names are those of
# sd-scripts (`networks/lora.py`, `lora_flux.py`, `lora_sd3.py`), OneTrainer and XLabs.
LINEAR = (24, 16)
KINDS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "kohya-sdxl": (
        ".lora_down.weight",
        ".lora_up.weight",
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": LINEAR,
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": LINEAR,
            "lora_te2_text_model_encoder_layers_0_mlp_fc1": LINEAR,
        },
    ),
    "locon": (
        ".lora_down.weight",
        ".lora_up.weight",
        {
            "lora_unet_down_blocks_0_resnets_0_conv1": (20, 12, 3, 3),
            "lora_unet_down_blocks_0_attentions_0_proj_in": (20, 12, 1, 1),
            "lora_te_text_model_encoder_layers_0_mlp_fc1": LINEAR,
        },
    ),
    "kohya-flux": (
        ".lora_down.weight",
        ".lora_up.weight",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
            "lora_unet_single_blocks_0_linear1": (112, 16),
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": LINEAR,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": LINEAR,
        },
    ),
    "onetrainer": (
        ".lora_down.weight",
        ".lora_up.weight",
        {"transformer.single_transformer_blocks.0.attn.to_q": LINEAR, "lora_te1_text_projection": LINEAR},
    ),
    "xlabs": (
        ".down.weight",
        ".up.weight",
        {
            "double_blocks.0.processor.qkv_lora1": (48, 16),
            "double_blocks.0.processor.qkv_lora2": (48, 16),
            "double_blocks.0.processor.proj_lora1": LINEAR,
        },
    ),
    "qwen-image": (
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        {"transformer_blocks.0.attn.to_q": LINEAR, "transformer_blocks.0.img_mlp.net.2": LINEAR},
    ),
}
RANK = 5


def factors(shape: tuple[int, ...], seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator) * 0.6 ** torch.arange(rank)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, up.reshape(shape[0], rank, *[1] * (len(shape) - 2))


def file_of(kind: str, folder: Path, **more: Tensor) -> Path:
    down, up, modules = KINDS[kind]
    tensors = dict(more)
    for seed, (module, shape) in enumerate(modules.items()):
        tensors[module + down], tensors[module + up] = factors(shape, seed)
        if "lora_down" in down:
            tensors[f"{module}.alpha"] = torch.tensor(2.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors"


def products(path: Path, kind: str) -> dict[str, np.ndarray]:
    """The update of each module, flat: alpha over rank, up times down."""
    down, up, modules = KINDS[kind]
    tensors = {k: t.double() for k, t in load_file(path).items()}
    found = {}
    for module in modules:
        a, b = tensors[module + down], tensors[module + up]
        scaling = float(tensors[f"{module}.alpha"]) / len(a) if f"{module}.alpha" in tensors else 1.0
        found[module] = (scaling * b.flatten(1) @ a.flatten(1)).numpy()
    return found


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= 1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 3])
def test_every_trade_equals_the_oracle(kind, rank, tmp_path):
    path = file_of(kind, tmp_path)
    edit(path, tmp_path / "out.safetensors", *(["--rank", rank] if rank else []))
    before, after = products(path, kind), products(tmp_path / "out.safetensors", kind)
    for module, dw in before.items():
        want = monosoup_update(dw)[0]
        assert close(after[module], truncated(want, rank) if rank else want), module
    assert list(load_file(path)) == list(load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_tucker_core_stays_or_is_multiplied_in(rank, tmp_path):
    module = "lora_unet_mid_block_resnets_0_conv1"
    mid = torch.randn(RANK, RANK, 3, 3, generator=torch.Generator().manual_seed(7))
    down, up = factors((20, 12, 1, 1), 8)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    save_file(
        tensors | {f"{module}.lora_mid.weight": mid, f"{module}.alpha": torch.tensor(1.0)},
        tmp_path / "in.safetensors",
    )
    edit(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *(["--rank", rank] if rank else []))
    after = {k: t.double() for k, t in load_file(tmp_path / "out.safetensors").items()}

    def product(down: Tensor, up: Tensor, mid: Tensor) -> np.ndarray:
        dw = torch.einsum("oa,abhw,bi->oihw", up.double().flatten(1), mid.double(), down.double().flatten(1))
        return dw.flatten(1).numpy() / len(down)

    want = monosoup_update(product(down, up, mid))[0]
    new_down, new_up = (after[f"{module}.lora_{end}.weight"] for end in ("down", "up"))
    if rank is None:
        assert close(product(new_down, new_up, after[f"{module}.lora_mid.weight"]), want)
    else:
        assert f"{module}.lora_mid.weight" not in after
        assert new_down.shape == (rank, 12, 3, 3)
        got = (new_up.flatten(1) @ new_down.flatten(1)).numpy() / rank
        assert close(got, truncated(want, rank))


FOREIGN = {
    "DoRA": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.dora_scale",
    "LoHa": "lora_unet_x.hada_w1_a",
    "LoKr": "lora_unet_x.lokr_w1",
    "OFT": "lora_unet_x.oft_blocks",
    "whole": "lora_unet_x.diff",
    "known here": "bundle_emb.token.string_to_param",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_plain_lora_stays_bit_for_bit(kind, tmp_path):
    key = FOREIGN[kind]
    path = file_of("kohya-sdxl", tmp_path, **{key: torch.randn(4, 4)})
    result = edit(path, tmp_path / "out.safetensors")
    assert kind in result.output
    assert "Warning" in result.output
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert {k for k in before if k.startswith(key.rpartition(".")[0])} <= same
    refuse(path, tmp_path / "strict.safetensors", "not plain LoRA", arguments=("--strict",))


def spoiled(path: Path, change) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


UP = "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
DAMAGES = {
    "partial": (lambda t: t.pop(UP), ("lora_te2", "incomplete")),
    "nan": (lambda t: t[UP].fill_(float("nan")), ("lora_te2", "NaN")),
    "shapes": (lambda t: t.update({UP: torch.zeros(24, 3)}), (UP, "do not multiply")),
    "empty": (lambda t: t.update({UP: torch.zeros(0, 5)}), (UP, "is empty")),
    "alpha": (
        lambda t: t.update({UP.replace("lora_up.weight", "alpha"): torch.ones(2)}),
        ("alpha", "damaged"),
    ),
    "infinite alpha": (
        lambda t: t.update({UP.replace("lora_up.weight", "alpha"): torch.tensor(np.inf)}),
        ("inf",),
    ),
    "float8": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), (UP, "float16")),
    "mixed": (lambda t: t.update({"unet.x.lora_A.weight": torch.ones(2, 4)}), ("two trades", "lora_A")),
    "no LoRA": (lambda t: (t.clear(), t.update(weight=torch.ones(2, 2))), ("holds no LoRA",)),
    "LoHa alone": (lambda t: (t.clear(), t.update({"x.hada_w1_a": torch.ones(2, 2)})), ("LoHa", "merge it")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_and_nothing_is_written(damage, tmp_path):
    change, words = DAMAGES[damage]
    path = spoiled(file_of("kohya-sdxl", tmp_path), change)
    refuse(path, tmp_path / "out.safetensors", path.name, *words)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = file_of("kohya-sdxl", tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    refuse(path, tmp_path / "out.safetensors", "cut off")


def test_settings_that_are_no_settings_are_refused(tmp_path):
    path = tmp_path / "in.safetensors"
    down, up = factors(LINEAR, 0)
    tensors = {"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up.contiguous()}
    for settings, word in (
        ("{", "no JSON"),
        ("[]", "no mapping"),
        ({"unet.lora_alpha": "x"}, "no number"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}, "no regular"),
    ):
        text = settings if isinstance(settings, str) else json.dumps(settings)
        save_file(tensors, path, metadata={"lora_adapter_metadata": text})
        refuse(path, tmp_path / "out.safetensors", "lora_adapter_metadata", word)
    save_file(
        tensors, path, metadata={"lora_adapter_metadata": json.dumps({"unet.r": 7, "unet.lora_alpha": 7})}
    )
    refuse(path, tmp_path / "out.safetensors", "rank 5", "says 7")


def test_places_that_are_taken_or_wrong_are_refused(tmp_path):
    path = file_of("kohya-sdxl", tmp_path)
    before = path.read_bytes()
    from lora_edits import run

    (tmp_path / "taken.safetensors").write_text("mine")
    for arguments, word in (
        ((path, path, "--overwrite"), "the input itself"),
        ((path, tmp_path / "taken.safetensors"), "--overwrite"),
        ((path, tmp_path / "folder"), ".safetensors"),
        ((path, tmp_path / "out.safetensors", "--rank", 9), "larger than"),
        ((path, tmp_path, tmp_path / "out.safetensors"), "one kind at a time"),
        ((path, tmp_path / "out.safetensors", "--base", "x"), "--base"),
        ((tmp_path / "none.safetensors", tmp_path / "out.safetensors"), "not a file"),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2), arguments
        assert word in result.output
        assert isinstance(result.exception, SystemExit)
    assert path.read_bytes() == before
    assert (tmp_path / "taken.safetensors").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kohya-sdxl.safetensors", "taken.safetensors"]
    edit(path, tmp_path / "taken.safetensors", "--overwrite")


def test_files_that_have_no_average_are_refused(tmp_path):
    one, other = file_of("kohya-sdxl", tmp_path / "a"), file_of("onetrainer", tmp_path / "b")
    from lora_edits import run

    result = run(one, other, tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "no module in common" in result.output
    other = file_of("kohya-sdxl", tmp_path / "c", **{"lora_unet_x.diff": torch.ones(2, 2)})
    result = run(one, other, tmp_path / "out.safetensors")
    assert "no average" in result.output
    assert not (tmp_path / "out.safetensors").exists()
