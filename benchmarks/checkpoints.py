"""Checkpoints in the shape of Qwen3-0.6B, and a check of what comes out of a merge of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_monosoup.spectral import edit_weight

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD = 1024, 3072, 16, 8, 128
UPDATE_RANK = 256


def tensor_shapes(layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every stored tensor; the output head is tied to the embedding."""
    yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KEY_VALUE_HEADS * HEAD, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KEY_VALUE_HEADS * HEAD, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield prefix + "self_attn.q_norm.weight", (HEAD,)
        yield prefix + "self_attn.k_norm.weight", (HEAD,)
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def write(folder: Path, layers: int, vocabulary: int, tuned: int = 1) -> None:
    """Write `base` and `tuned1`, `tuned2`, ... below a folder: configuration and one safetensors file each.

    No model is built; tensors live in bf16 until their file is written.
    """
    shapes = list(tensor_shapes(layers, vocabulary))
    _write_checkpoint(
        folder / "base", {name: _base(shape, i) for i, (name, shape) in enumerate(shapes)}, layers, vocabulary
    )
    for number in range(1, tuned + 1):
        tensors = {}
        with safe_open(folder / "base" / "model.safetensors", "pt") as base:
            for index, (name, shape) in enumerate(shapes):
                weight = base.get_tensor(name).float()
                tensors[name] = weight.add_(_update(shape, 1000 * number + index)).bfloat16()
        _write_checkpoint(folder / f"tuned{number}", tensors, layers, vocabulary)


def _write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], layers: int, vocabulary: int) -> None:
    from transformers import Qwen3Config

    folder.mkdir(parents=True)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _base(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    return torch.empty(shape).normal_(std=0.02, generator=generator).bfloat16()


def _update(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return an update of 1 % of the norm: rank 256 with a power law; bf16 adds its noise."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return 0.01 * torch.randn(shape, generator=generator)
    scale = torch.arange(1.0, UPDATE_RANK + 1) ** -0.5
    left = torch.randn(shape[0], UPDATE_RANK, generator=generator) * scale
    update = left @ torch.randn(UPDATE_RANK, shape[1], generator=generator)
    # Expected norm, without a pass over the product.
    return update.mul_(0.01 * 0.02 / math.sqrt(float(scale.square().sum())))


def verify(base: Path, tuned: Path, merged: Path, method: str, largest: int) -> int:
    """Compare a merged checkpoint with float64, tensor by tensor; return how many were compared.

    Args:
        base: W0.
        tuned: W1.
        merged: what the merge wrote.
        method: `monosoup`, or `linear` for the mean of both.
        largest: tensors with more entries are only looked at for their shape and finite values.
    """
    compared = 0
    with (
        safe_open(base / "model.safetensors", "pt") as w0s,
        safe_open(tuned / "model.safetensors", "pt") as w1s,
        Merged(merged) as results,
    ):
        names = set(w0s.keys())
        assert names == set(results.keys()), f"{merged} holds other tensors than {base}"
        for name in sorted(names):
            w0, w1, result = w0s.get_tensor(name), w1s.get_tensor(name), results.get_tensor(name)
            assert result.shape == w0.shape, name
            assert result.isfinite().all(), name
            if w0.numel() > largest:
                continue
            compared += 1
            if method == "linear":
                exact = (w0.double() + w1.double()) / 2
                assert (
                    (result.double() - exact).abs() <= cases.half_spacing(exact, w0.dtype) * 1.01
                ).all(), name
            elif w0.ndim < 2:
                assert torch.equal(result, w1), name
            else:
                # The record is not part of a merge: the same edit gives it, and must give the same weight.
                again, record = edit_weight(w0, [w1])
                assert float((again != result).float().mean()) < 1e-3, name
                cases.check(result, record, w0, w1)
    return compared


class Merged:
    """The tensors of a merged checkpoint, sharded or not."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                self._where = dict.fromkeys(file.keys(), "model.safetensors")
        self._folder = folder

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def keys(self) -> list[str]:
        """Return the names."""
        return list(self._where)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        with safe_open(self._folder / self._where[name], "pt") as file:
            return file.get_tensor(name)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        write(Path(rest[0]), *(int(number) for number in rest[1:]))
    elif command == "verify":
        print(verify(Path(rest[0]), Path(rest[1]), Path(rest[2]), rest[3], int(rest[4])))
    elif command == "methods":
        from mergekit_monosoup.registry import method_names

        print(" ".join(method_names()))
    else:
        sys.exit(f"unknown command {command}")
