"""`mergekit-monosoup extract` on pairs of real checkpoints, loaded back by peft and transformers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from lora_edits import truncated
from oracle import monosoup_update
from safetensors.torch import load_file
from torch import Tensor

from mergekit_monosoup.cli import main

MODELS = {
    "tied": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-6
        )
    ),
    "untied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "conv1d": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    ),
    "convolutions": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 32,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["extract", *map(str, arguments)])


def extract(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Base and fine-tune of each kind in float32; every tensor has moved, matrices by few directions."""
    made = {}
    for kind, make in MODELS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(folder / "base")
        for parameter in model.parameters():
            parameter.data += 0.01 * moved(parameter.shape)
        model.save_pretrained(folder / "tuned")
        made[kind] = (folder / "base", folder / "tuned")
    return made


def moved(shape: torch.Size) -> Tensor:
    if len(shape) < 2:
        return torch.randn(shape)
    rows, columns = shape[0], shape[1:].numel()
    decay = 0.5 ** torch.arange(min(rows, columns))
    return ((torch.randn(rows, len(decay)) * decay) @ torch.randn(len(decay), columns)).reshape(shape)


def opened(kind: str, folder: Path) -> torch.nn.Module:
    return type(MODELS[kind]()).from_pretrained(folder, dtype=torch.float32)


def adapted(kind: str, base: Path, adapter: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(opened(kind, base), adapter)


def wanted(w0: Tensor, w1: Tensor, rank: int | None, alpha: float = 1.0) -> np.ndarray:
    dw = (w1.double() - w0.double()).numpy()
    if dw.ndim > 1:
        flat = monosoup_update(dw.reshape(len(dw), -1))[0]
        dw = (flat if rank is None else truncated(flat, rank)).reshape(dw.shape)
    return w0.double().numpy() + alpha * dw


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("alpha", [1, 0.5])
def test_merged_by_peft_it_is_the_truncated_edit(kind, alpha, pairs, tmp_path):
    base, tuned = pairs[kind]
    extract(base, tuned, tmp_path / "out", "--rank", 4, "--alpha", alpha)
    w0, w1 = opened(kind, base).state_dict(), opened(kind, tuned).state_dict()
    merged = adapted(kind, base, tmp_path / "out").merge_and_unload().state_dict()
    record = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
    for told in record["tensors"]:
        name = told["tensor"]
        if told["outcome"] == "unchanged":
            assert torch.equal(merged[name], w0[name])
            continue
        want = wanted(w0[name], w1[name], told["rank"], alpha)
        # The sum of weight and update is rounded to float32 where it is added.
        bound = 1e-5 * np.abs(want - w0[name].double().numpy()).max() + 2e-7 * np.abs(want).max()
        assert np.abs(merged[name].double().numpy() - want).max() <= bound, name
        assert told["outcome"] == ("whole" if told["rank"] is None else "factors")
        whole = wanted(w0[name], w1[name], None, alpha) - w0[name].double().numpy()
        if not whole.any():
            # Statistics of a normalisation that comes along with its weights.
            continue
        error = np.linalg.norm(want - w0[name].double().numpy() - whole) / np.linalg.norm(whole)
        assert told["error"] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied", "conv1d"])
def test_unmerged_and_in_transformers_it_computes_the_same(kind, pairs, tmp_path):
    base, tuned = pairs[kind]
    extract(base, tuned, tmp_path / "out", "--rank", 1.0, "--plain")
    tokens = torch.arange(12)[None]
    want = opened(kind, tuned)(tokens).logits
    assert not torch.allclose(opened(kind, base)(tokens).logits, want, atol=1e-3)
    torch.testing.assert_close(adapted(kind, base, tmp_path / "out")(tokens).logits, want, atol=1e-5, rtol=0)
    model = opened(kind, base)
    model.load_adapter(tmp_path / "out")
    torch.testing.assert_close(model(tokens).logits, want, atol=1e-5, rtol=0)


def test_what_vllm_asks_of_an_adapter(pairs, tmp_path):
    """Its `PEFTHelper` and `LoRAModel` want this; they scale all factors by one alpha over one rank."""
    base, tuned = pairs["untied"]
    extract(base, tuned, tmp_path / "out", "--rank", 0.9, "--factors-only")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    assert isinstance(config["target_modules"], list)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.")
        assert key.endswith(ends)
        assert min(tensor.shape) <= config["r"]


def test_rounding_of_storage_costs_no_rank(pairs, tmp_path):
    base, _ = pairs["untied"]
    torch.manual_seed(1)
    model = opened("untied", base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            update = torch.randn(rows, 2) @ torch.randn(2, columns)
            # About as large as the spacing of bfloat16 at the weight.
            update *= 0.01 * parameter.float().std() / update.std()
            parameter.data = (parameter.float() + update).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tuned")
    for rank in ("auto", 0.95):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "--rank", rank, "--overwrite")
        record = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
        factored = [t for t in record["tensors"] if t["k"] is not None]
        assert record["noise"] > 0.02
        for told in factored:
            assert told["noise"] > 0.01
            assert told["effective_rank"] > 4
            assert told["rank"] <= 4, told


def test_a_layer_that_has_not_moved_has_no_factors(pairs, tmp_path):
    base, tuned = pairs["untied"]
    model, other = opened("untied", tuned), opened("untied", base)
    model.model.layers[1] = copy.deepcopy(other.model.layers[1])
    model.save_pretrained(tmp_path / "tuned")
    output = extract(base, tmp_path / "tuned", tmp_path / "out")
    assert "unchanged" in output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    assert not any("layers.1." in name for name in config["target_modules"])
    merged = adapted("untied", base, tmp_path / "out").merge_and_unload().state_dict()
    same = [k for k, t in other.state_dict().items() if torch.equal(merged[k], t)]
    assert all(k in same for k in merged if "layers.1." in k)


def test_mistakes_are_refused_in_a_sentence(pairs, tmp_path):
    base, tuned = pairs["untied"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    spoiled = opened("untied", tuned)
    spoiled.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    spoiled.save_pretrained(tmp_path / "nan")
    small = transformers.Qwen2Config(**SIZES | {"intermediate_size": 40}, num_key_value_heads=2)
    transformers.Qwen2ForCausalLM(small).save_pretrained(tmp_path / "small")
    for arguments, word in (
        ((base, base, tmp_path / "out"), "same checkpoint"),
        ((base, f"{tuned}+x", tmp_path / "out"), "adapter already"),
        ((base, tuned, tmp_path / "taken"), "--overwrite"),
        ((base, tuned, tmp_path / "out", "--rank", 0), "at least 1"),
        ((base, tuned, tmp_path / "out", "--rank", 1.5), "(0, 1]"),
        ((base, tuned, tmp_path / "out", "--alpha", -1), "alpha"),
        ((base, tmp_path / "nan", tmp_path / "out"), "up_proj"),
        ((base, tmp_path / "small", tmp_path / "out"), "shapes differ"),
        ((base, tmp_path / "none", tmp_path / "out"), "none"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert word in result.output, result.output
        assert isinstance(result.exception, SystemExit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan", "small", "taken"]
