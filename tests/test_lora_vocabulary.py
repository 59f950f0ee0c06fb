"""Adapters that bring their own vocabulary: the merged folder in transformers against peft's merged model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import oracle
import peft
import pytest
import torch
import transformers
from adapters import fill
from beside import our_command, our_merge, read_json
from checkpoints import build_model, build_tokenizer, load_tensors, write_checkpoint
from commands import recipe, write_config
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("registered", "one_thread", "fresh_loaders")

NEW = ("<call>", "</call>", "<think>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WAYS = {
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved modules, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained tokens": {"trainable_token_indices": "new"},
    "trained tokens, tied": {"trainable_token_indices": "new"},
    "resized only": {},
    "resized only, tied": {},
    "factors": {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
}


def _write(way: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter with three tokens more and their tokenizer, and what peft merges of them."""
    model = build_model("qwen3-tied" if way.endswith("tied") else "qwen3-untied").float()
    base = write_checkpoint(folder / "base", model, torch.float32)
    words = build_tokenizer(extra=NEW)
    old = model.get_input_embeddings().weight.shape[0]
    ids = words.convert_tokens_to_ids(list(NEW))
    # Checkpoints of the tests have padding rows; the new tokens go behind them.
    model.resize_token_embeddings(max(old, max(ids) + 1) + 2, mean_resizing=False)
    options = dict(WAYS[way])
    if options.get("trainable_token_indices") == "new":
        options["trainable_token_indices"] = {"embed_tokens": [5, *ids]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            **{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
            | options
        )
        adapted = peft.get_peft_model(model, config)
        fill(adapted, 1)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=True)
        words.save_pretrained(folder / "adapter")
        merged = adapted.merge_and_unload()
    return base, folder / "adapter", {n: t.clone() for n, t in merged.state_dict().items()}


def _loaded(out: Path) -> transformers.PreTrainedModel:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _logits(model: torch.nn.Module, out: Path) -> torch.Tensor:
    words = transformers.AutoTokenizer.from_pretrained(out)
    ids = words("the <call> tin </call> answer <think>", return_tensors="pt", add_special_tokens=False)
    assert set(words.convert_tokens_to_ids(list(NEW))) <= set(ids["input_ids"][0].tolist())
    with torch.no_grad():
        return model(ids["input_ids"]).logits


@pytest.mark.parametrize("way", WAYS)
def test_without_an_edit_it_is_what_peft_merges(way, tmp_path):
    base, adapter, want = _write(way, tmp_path)
    config = recipe(base, f"{base}+{adapter}", parameters={"edit": False})
    planned = our_command("plan", write_config(tmp_path, config))
    assert planned.exit_code == 0, planned.output
    out = our_merge(tmp_path, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    model = _loaded(out)
    assert read_json(out / "config.json")["vocab_size"] == len(want[EMBEDDING])
    expected = transformers.AutoModelForCausalLM.from_config(model.config)
    expected.load_state_dict(want)
    torch.testing.assert_close(_logits(model, out), _logits(expected.eval(), out), rtol=0, atol=1e-5)
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same is way.endswith("tied")


@pytest.mark.parametrize("way", WAYS)
def test_edited_it_is_the_edit_of_each_update(way, tmp_path):
    """Rows of the base's tokens are edited, those of new tokens are the adapter's."""
    base, adapter, merged = _write(way, tmp_path)
    out = our_merge(tmp_path, recipe(base, f"{base}+{adapter}"))
    stored, want = load_tensors(base), {}
    for name, tensor in merged.items():
        w0 = stored.get(name, stored[EMBEDDING]).double().numpy()
        w1 = tensor.double().numpy()
        if name in (EMBEDDING, HEAD):
            rows = w1.copy()
            rows[: len(w0)] = _edited(w0, w1[: len(w0)], rank=3 if way == "factors" else None)
            want[name] = rows
        else:
            want[name] = _edited(w0, w1, rank=3) if w1.ndim == 2 else w1
    model = _loaded(out)
    expected = transformers.AutoModelForCausalLM.from_config(model.config)
    expected.load_state_dict({name: torch.from_numpy(array).float() for name, array in want.items()})
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=2e-5, msg=name)
    torch.testing.assert_close(_logits(model, out), _logits(expected.eval(), out), rtol=0, atol=1e-4)
    assert torch.equal(model.state_dict()[EMBEDDING][-2:], merged[EMBEDDING][-2:])


def test_new_tokens_without_the_embedding_that_they_stand_in_are_refused(tmp_path):
    base, adapter, _ = _write("trained tokens", tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if "base_layer" not in n and "lm_head" not in n}
    assert any("trainable_tokens" in name for name in kept)
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = write_config(tmp_path, recipe(base, f"{base}+{adapter}"))
    for command in (["plan", config], ["merge", config, tmp_path / "out", "--quiet"]):
        result = our_command(*command)
        assert result.exit_code == 1
        assert "trains tokens that base" in result.output
        assert "save_embedding_layers=True" in result.output


def _edited(w0: np.ndarray, w1: np.ndarray, rank: int | None) -> np.ndarray:
    """The oracle's edit; of factors, without the rounding of float32 beyond their rank."""
    dw = w1 - w0
    if not dw.any():
        return w0
    if rank is not None:
        u, s, vt = np.linalg.svd(dw, full_matrices=False)
        dw = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return w0 + oracle.monosoup_update(dw)[0]
