"""How tensors of every shape are read as matrices, and that the reading is what gets edited."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_monosoup.spectral import edit_update
from mergekit_monosoup.spectral.matrix import choose_view

# One parameter of each kind with three or more axes (or several biases) in transformers 5.23's own
# model classes: [model type, name, shape, kind]; names with the same last two parts are listed once.
RECORDED = json.loads((Path(__file__).parent / "data" / "parameter_names.json").read_text())


@pytest.mark.parametrize("kind", ["vector", "matrix", "flattened", "squeezed", "stack"])
def test_names_of_real_models(kind):
    rows = [row for row in RECORDED if row[3] == kind]
    wrong = [row for row in rows if choose_view(tuple(row[2]), row[1]).kind != kind]
    assert rows
    assert not wrong


VIEWS = [
    ("model.layers.0.self_attn.q_proj.weight", (32, 24), "matrix", (1, 32, 24)),
    ("transformer.h.0.attn.c_attn.weight", (32, 96), "matrix", (1, 32, 96)),
    ("score.weight", (1, 32), "matrix", (1, 1, 32)),
    ("model.norm.weight", (32,), "vector", (1, 1, 32)),
    ("logit_scale", (), "vector", (1, 1, 1)),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 96), "vector", (1, 4, 96)),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "matrix", (1, 32, 4)),
    ("rel_pos.bias_table", (49, 4), "matrix", (1, 49, 4)),
    # whole stacks of experts: transformers 5, Llama 4 and GPT-OSS ([experts, in, out]), Granite, JetMoE
    ("model.layers.0.mlp.experts.gate_up_proj", (128, 1536, 2048), "stack", (128, 1536, 2048)),
    ("model.layers.0.feed_forward.experts.down_proj", (16, 8192, 5120), "stack", (16, 8192, 5120)),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (8, 64, 32), "stack", (8, 64, 32)),
    ("model.layers.0.mlp.output_linear.weight", (8, 32, 64), "stack", (8, 32, 64)),
    ("model.layers.0.mlp.experts.down_proj", (1, 32, 48), "stack", (1, 32, 48)),
    ("model.layers.0.mlp.experts.3.gate_proj.weight", (24, 32), "matrix", (1, 24, 32)),
    # convolutions of one dimension: Whisper, Mamba (depthwise), HuBERT (weight norm, grouped)
    ("model.encoder.conv1.weight", (384, 80, 3), "flattened", (1, 384, 240)),
    ("backbone.layers.0.mixer.conv1d.weight", (64, 1, 4), "flattened", (1, 64, 4)),
    ("encoder.pos_conv_embed.conv.weight_v", (768, 48, 128), "flattened", (1, 768, 6144)),
    ("encoder.pos_conv_embed.conv.weight_g", (1, 1, 128), "vector", (1, 1, 128)),
    # of two and three: patches, depthwise (timm and transformers ConvNeXt), video
    ("visual.conv1.weight", (768, 3, 16, 16), "flattened", (1, 768, 768)),
    ("stages.0.blocks.0.conv_dw.weight", (96, 1, 7, 7), "flattened", (1, 96, 49)),
    ("convnext.encoder.stages.0.layers.0.dwconv.weight", (96, 1, 7, 7), "flattened", (1, 96, 49)),
    ("layer1.0.conv2.weight", (256, 8, 3, 3), "flattened", (1, 256, 72)),
    ("visual.patch_embed.proj.weight", (1280, 3, 2, 14, 14), "flattened", (1, 1280, 1176)),
    ("head.conv.weight", (1, 16, 3, 3), "flattened", (1, 1, 144)),
    # tables and tokens
    ("vit.embeddings.position_embeddings", (1, 197, 768), "squeezed", (1, 197, 768)),
    ("pos_embed", (1, 197, 768), "squeezed", (1, 197, 768)),
    ("cls_token", (1, 1, 768), "vector", (1, 1, 768)),
    ("grn.weight", (1, 1, 1, 96), "vector", (1, 1, 96)),
    ("rg_lru.input_gate_weight", (10, 256, 256), "stack", (10, 256, 256)),
    ("transformer.layer.0.rel_attn.q", (1024, 16, 64), "flattened", (1, 1024, 1024)),
    # without a name, the shape alone
    (None, (4, 24, 32), "stack", (4, 24, 32)),
    (None, (1, 24, 32), "squeezed", (1, 24, 32)),
    (None, (4, 24, 3, 3), "flattened", (1, 4, 216)),
    ("empty.weight", (0, 4), "vector", (1, 1, 0)),
]


@pytest.mark.parametrize(("name", "shape", "kind", "view"), VIEWS, ids=lambda v: str(v))
def test_rule(name, shape, kind, view):
    tensor = torch.arange(float(np.prod(shape, dtype=int))).reshape(shape)
    chosen = choose_view(tuple(tensor.shape), name)
    read = chosen.of(tensor)
    assert (chosen.kind, chosen.shape) == (kind, view)
    assert tuple(read.shape) == view
    assert torch.equal(read.reshape(-1), tensor.reshape(-1))


@pytest.mark.parametrize(
    ("matrix", "shape", "kind", "view"),
    [
        ("flatten", (4, 24, 32), "flattened", (1, 4, 768)),
        ("stack", (4, 24, 32), "stack", (4, 24, 32)),
        ("stack", (2, 3, 24, 32), "stack", (6, 24, 32)),
        ("flatten", (1, 24, 32), "flattened", (1, 1, 768)),
        ("flatten", (24, 32), "matrix", (1, 24, 32)),
        ("stack", (24, 32), "matrix", (1, 24, 32)),
        ("stack", (32,), "vector", (1, 1, 32)),
    ],
)
def test_override(matrix, shape, kind, view):
    for name in ("model.encoder.conv1.weight", "mlp.experts.down_proj", None):
        chosen = choose_view(shape, name, matrix)
        assert (chosen.kind, chosen.shape) == (kind, view)


def test_the_edit_of_the_transpose_is_the_transpose_of_the_edit():
    dw = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edited, record = edit_update(dw, energy=0.8)
    turned, turned_record = edit_update(dw.T, energy=0.8)
    assert torch.allclose(edited, turned.T, rtol=0, atol=1e-12)
    assert record.k == turned_record.k
    assert record.lambda_low == pytest.approx(turned_record.lambda_low, abs=1e-12)


NAMED = {
    "model.layers.0.mlp.experts.down_proj": (3, 20, 28),
    "model.encoder.conv1.weight": (24, 8, 3),
    "stages.0.blocks.0.conv_dw.weight": (24, 1, 3, 3),
    "vit.embeddings.position_embeddings": (1, 17, 32),
}


@pytest.mark.parametrize("matrix", ["auto", "flatten", "stack"])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.usefixtures("registered")
def test_each_matrix_is_edited_on_its_own(name, matrix):
    from mergekit.merge_methods import merge_tensors

    generator = torch.Generator().manual_seed(1)
    w0, dw = (torch.randn(NAMED[name], dtype=torch.float64, generator=generator) for _ in range(2))
    merged = merge_tensors(
        [w0, w0 + dw],
        "monosoup",
        base_index=0,
        name=name,
        parameters={"energy": 0.6, "matrix": matrix},
    )
    view = choose_view(NAMED[name], name, matrix)
    matrices = (w0 + dw - w0).numpy().reshape(view.shape)
    expected = np.stack([oracle.monosoup_update(m, 0.6)[0] for m in matrices]).reshape(w0.shape)
    assert np.abs((merged - w0).numpy() - expected).max() < 1e-12


@pytest.mark.usefixtures("registered")
def test_min_relative_update_is_asked_of_each_matrix_of_a_stack():
    """Fused experts and experts in files of their own give the same weights."""
    from mergekit.merge_methods import merge_tensors

    generator = torch.Generator().manual_seed(2)
    w0, dw = (torch.randn(4, 20, 28, generator=generator) for _ in range(2))
    w1 = w0 + dw * torch.tensor([1e-3, 0.1, 1e-3, 0.1]).reshape(4, 1, 1)
    options = {"energy": 0.6, "min_relative_update": 0.01}
    name = "model.layers.0.mlp.experts.down_proj"
    fused = merge_tensors([w0, w1], "monosoup", base_index=0, name=name, parameters=options)
    single = [
        merge_tensors([a, b], "monosoup", base_index=0, parameters=options)
        for a, b in zip(w0, w1, strict=True)
    ]
    assert torch.equal(fused, torch.stack(single))
    assert torch.equal(fused[0], w1[0])
    assert not torch.equal(fused[1], w1[1])


class LargestInFloat32(TorchDispatchMode):
    """Watch how many entries the largest float32 tensor has that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("threshold", [0, 1e-3])
def test_no_stack_is_copied_to_float32(threshold, monkeypatch):
    from mergekit.merge_methods import merge_tensors

    from mergekit_monosoup.spectral import batch

    # Small matrices are taken together up to a few megabytes; here, two of the nine at a time.
    monkeypatch.setattr(batch, "_CPU_ENTRIES", 2 * 12 * 20)
    generator = torch.Generator().manual_seed(3)
    w0 = torch.randn(9, 12, 20, generator=generator).bfloat16()
    w1 = w0 + torch.randn(9, 12, 20, generator=generator).bfloat16()
    options = {"energy": 0.6, "min_relative_update": threshold}
    with LargestInFloat32() as watched:
        merge_tensors([w0, w1], "monosoup", base_index=0, parameters=options)
    assert 0 < watched.entries <= 2 * 12 * 20


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_running_statistics_are_those_of_the_fine_tuned_model(alpha):
    from mergekit.merge_methods import merge_tensors

    w0, w1 = torch.zeros(8), torch.rand(8)
    for name in ("bn1.running_mean", "layer1.0.bn1.running_var"):
        merged = merge_tensors([w0, w1], "monosoup", base_index=0, name=name, parameters={"alpha": alpha})
        assert torch.equal(merged, w1)
    merged = merge_tensors([w0, w1], "monosoup", base_index=0, name="bn1.weight", parameters={"alpha": alpha})
    assert torch.equal(merged, alpha * w1)
