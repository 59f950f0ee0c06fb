"""Storage types: float8 with and without scales, wide floats, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import (
    build_model,
    copy_as_bin,
    copy_with_tensors,
    edit_config,
    fine_tune,
    load_tensors,
    write_checkpoint,
)
from click.testing import CliRunner
from commands import forget_loaders, invoke, recipe, write_config
from expectations import assert_merged
from families import BY_KEY, write_pair
from safetensors.torch import save_file

from mergekit_monosoup import edit_state_dict
from mergekit_monosoup.checkpoint.float8 import dequantise
from mergekit_monosoup.errors import QuantizedWeightError

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

ENERGY = {"energy": 0.6}
KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OPTIONS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def expand(scale, shape, block):
    """One factor for each entry, written out with Kronecker products."""
    full = torch.kron(scale, torch.ones(block)) if scale.ndim == 2 else scale.reshape(1, 1).expand(shape)
    return full[: shape[0], : shape[1]]


def quantise(tensors, kind, layout):
    """Linear weights as float8 with scales: the state dict, and what it is worth."""
    stored, worth = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "proj" not in name:
            stored[name] = worth[name] = tensor
            continue
        rows, columns = tensor.shape
        block = {"tensor": (rows, columns), "row": (1, columns), "block": (8, 8)}[layout]
        counts = (-(-rows // block[0]), -(-columns // block[1]))
        scale = torch.rand(counts) * 0.01 + 0.01
        full = expand(scale, tensor.shape, block)
        q = (tensor.float() / full).to(kind)
        stored[name] = q
        worth[name] = q.float() * full
        suffix = "weight_scale_inv" if layout == "block" else "weight_scale"
        stored[name.removesuffix("weight") + suffix] = (
            scale.reshape(1) if layout == "tensor" and "q_proj" in name else scale
        )
        if layout == "tensor":
            stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
    return stored, worth


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    base = build_model("qwen3-untied")
    return [
        write_checkpoint(folder / name, model, torch.float32)
        for name, model in (("base", base), ("tuned", fine_tune(base, seed=1, relative=0.2)))
    ]


def merge_by_our_command(folder, config):
    from mergekit_monosoup.cli.merge import merge

    forget_loaders()
    try:
        arguments = [str(write_config(folder, config)), str(folder / "out"), *OPTIONS]
        return CliRunner().invoke(merge, arguments)
    finally:
        forget_loaders()


def assert_dequantised(merged, base, tuned, dtype):
    """Float8 weights were edited in float32; everything is stored as `dtype` or as it was."""
    assert set(merged) == set(base)
    assert_merged(merged, base, [tuned], ENERGY, out_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_plain_floats(tmp_path, models, dtype):
    folders = []
    for folder in models:
        tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(folder).items()}
        folders.append(copy_with_tensors(folder, tmp_path / folder.name, tensors))
    config = write_config(tmp_path, recipe(*folders, parameters=ENERGY))
    assert invoke("mergekit-yaml", config, tmp_path / "out", *OPTIONS).exception is None
    base, tuned, merged = (load_tensors(f) for f in (*folders, tmp_path / "out"))
    if dtype == torch.float64:
        edited = edit_state_dict(base, tuned, **ENERGY).weights
        assert all(torch.equal(merged[name], edited[name]) for name in base)
        merged = {name: tensor.float() for name, tensor in merged.items()}
    assert_merged(merged, base, [tuned], ENERGY, out_dtype=torch.float32 if dtype.itemsize > 2 else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["tensor", "row", "block"])
def test_float8_fine_tuned_on_a_plain_base_by_mergekit_yaml(tmp_path, models, kind, layout):
    stored, worth = quantise(load_tensors(models[1]), KINDS[kind], layout)
    tuned = copy_with_tensors(models[1], tmp_path / "tuned", stored)
    config = write_config(tmp_path, recipe(models[0], tuned, parameters=ENERGY, dtype="float32"))
    result = invoke("mergekit-yaml", config, tmp_path / "out", *OPTIONS)
    assert result.exception is None, result.exception
    assert_dequantised(load_tensors(tmp_path / "out"), load_tensors(models[0]), worth, torch.float32)


def test_float8_on_both_sides_by_our_command(tmp_path, models):
    folders, values = [], []
    for folder in models:
        stored, worth = quantise(load_tensors(folder), torch.float8_e4m3fn, "block")
        folders.append(copy_with_tensors(folder, tmp_path / folder.name, stored))
        edit_config(folders[-1], quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
        values.append(worth)
    result = merge_by_our_command(tmp_path, recipe(*folders, parameters=ENERGY))
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert set(merged) == set(values[0])
    float8 = [name for name in merged if "proj" in name]
    assert all(merged[name].dtype == torch.bfloat16 for name in float8)
    subsets = [{name: state[name] for name in float8} for state in (merged, *values)]
    assert_merged(subsets[0], subsets[1], [subsets[2]], ENERGY, out_dtype=torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_float8_and_plain_by_our_command_need_no_dtype(tmp_path, models):
    stored, _ = quantise(load_tensors(models[1]), torch.float8_e4m3fn, "row")
    tuned = copy_with_tensors(models[1], tmp_path / "tuned", stored)
    result = merge_by_our_command(tmp_path, recipe(models[0], tuned, parameters=ENERGY))
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert set(merged) == set(load_tensors(models[0]))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_float8_experts_are_dequantised_before_mergekit_fuses_them(tmp_path):
    folders = write_pair(BY_KEY["qwen3-moe-a-file-entry-for-each-expert"], tmp_path / "plain")
    quantised, plain = [], []
    for folder in folders:
        stored, worth = quantise(load_tensors(folder), torch.float8_e4m3fn, "row")
        quantised.append(copy_with_tensors(folder, tmp_path / "float8" / folder.name, stored))
        plain.append(copy_with_tensors(folder, tmp_path / "worth" / folder.name, worth))
    outputs = []
    for name, pair in (("a", quantised), ("b", plain)):
        config = recipe(*pair, parameters=ENERGY, dtype="float32")
        result = merge_by_our_command(tmp_path / name, config)
        assert result.exit_code == 0, result.output
        outputs.append(load_tensors(tmp_path / name / "out"))
    assert set(outputs[0]) == set(outputs[1])
    for name, tensor in outputs[0].items():
        assert torch.allclose(tensor, outputs[1][name], rtol=0, atol=1e-6), name


def test_a_float8_base_is_left_to_our_command(tmp_path, models):
    stored, _ = quantise(load_tensors(models[0]), torch.float8_e4m3fn, "row")
    base = edit_config(
        copy_with_tensors(models[0], tmp_path / "base", stored),
        quantization_config={"quant_method": "fbgemm_fp8"},
    )
    config = write_config(tmp_path, recipe(base, models[1], dtype="bfloat16"))
    result = invoke("mergekit-yaml", config, tmp_path / "out", *OPTIONS)
    assert isinstance(result.exception, QuantizedWeightError)
    assert "mergekit-monosoup merge" in str(result.exception)


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-pytorch"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_float8_without_scales_is_refused(tmp_path, models, command, dtype):
    tensors = load_tensors(models[1])
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tuned = copy_with_tensors(models[1], tmp_path / "tuned", tensors)
    inputs = [models[0], tuned]
    if command == "mergekit-pytorch":
        inputs = [folder / "model.safetensors" for folder in inputs]
    config = recipe(*inputs, **({"dtype": dtype} if dtype else {}))
    result = invoke(command, write_config(tmp_path, config), tmp_path / "out")
    assert isinstance(result.exception, QuantizedWeightError)
    assert name in str(result.exception)
    assert "no scale beside it" in str(result.exception)


def test_float8_with_scales_is_refused_by_mergekit_pytorch(tmp_path):
    """It would take the scales for weights."""
    state, _ = quantise({"a.proj.weight": torch.randn(16, 16)}, torch.float8_e4m3fn, "row")
    for name in ("base", "tuned"):
        save_file(state, tmp_path / f"{name}.safetensors")
    config = recipe(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    result = invoke("mergekit-pytorch", write_config(tmp_path, config), tmp_path / "out")
    assert isinstance(result.exception, QuantizedWeightError)
    assert "edit_state_dict" in str(result.exception)


@pytest.mark.parametrize("layout", ["tensor", "row", "block"])
def test_float8_in_memory(layout):
    plain = {"a.proj.weight": torch.randn(24, 40), "norm.weight": torch.rand(24)}
    tuned = {name: tensor + 0.3 * torch.randn(tensor.shape) for name, tensor in plain.items()}
    stored, worth = quantise(tuned, torch.float8_e4m3fn, layout)
    edited = edit_state_dict(plain, stored, **ENERGY).weights
    expected = edit_state_dict(plain, {n: t.bfloat16() for n, t in worth.items()}, **ENERGY).weights
    assert set(edited) == set(plain)
    assert edited["a.proj.weight"].dtype == torch.bfloat16
    assert torch.equal(edited["a.proj.weight"], expected["a.proj.weight"])


def test_blocks_of_128():
    """The last blocks may be cut: the layout of DeepSeek and of Qwen's float8 releases."""
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    expected = weight.float() * torch.kron(scale, torch.ones(128, 128))[:200, :300]
    assert torch.equal(dequantise(weight, scale, "w"), expected)
    stack = torch.randn(3, 16, 24).to(torch.float8_e5m2)
    factors = torch.rand(3, 1, 1)
    assert torch.equal(dequantise(stack, factors, "w"), stack.float() * factors)
    with pytest.raises(QuantizedWeightError, match="does not fit"):
        dequantise(weight, torch.rand(7, 3), "w")
    with pytest.raises(QuantizedWeightError, match="does not fit"):
        dequantise(weight, torch.rand(2, 3, 4), "w")


INTEGERS = {
    "gptq": ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 8, dtype=torch.int32)),
    "awq": ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 8, dtype=torch.int32)),
    "bitsandbytes": ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 1, dtype=torch.uint8)),
    "compressed-tensors": (
        "model.layers.0.mlp.up_proj.weight_packed",
        torch.zeros(8, 8, dtype=torch.int32),
    ),
    "mxfp4": (
        "model.layers.0.mlp.experts.down_proj_blocks",
        torch.zeros(2, 8, 8, dtype=torch.uint8),
    ),
    "hqq": ("model.layers.0.mlp.up_proj.W_q", torch.zeros(8, 8, dtype=torch.uint8)),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("method", INTEGERS)
def test_integer_formats_are_refused(tmp_path, models, method, suffix):
    name, packed = INTEGERS[method]
    tensors = load_tensors(models[1])
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    tuned = copy_with_tensors(models[1], tmp_path / "tuned", tensors | {name: packed})
    if suffix == "bin":
        tuned = copy_as_bin(tuned, tmp_path / "tuned-bin")
    edit_config(tuned, quantization_config={"quant_method": method})
    config = write_config(tmp_path, recipe(models[0], tuned))
    result = invoke("mergekit-yaml", config, tmp_path / "out", *OPTIONS)
    assert isinstance(result.exception, QuantizedWeightError), result.exception
    assert "dequantise" in str(result.exception)
    assert method in str(result.exception)
