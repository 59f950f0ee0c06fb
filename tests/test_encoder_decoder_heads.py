"""Encoder-decoders: one embedding under up to four names, stored once or under each, tied or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from beside import our_command, read_json
from checkpoints import fine_tune, load_tensors
from commands import recipe, write_config
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _t5(tied: bool) -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=96,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart(tied: bool) -> transformers.BartForConditionalGeneration:
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return transformers.BartForConditionalGeneration(config)


FAMILIES = {"T5": (_t5, ""), "BART": (_bart, "model.")}


def _written(family: str, tied: bool, folder: Path, seed: int | None = None) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family][0](tied).eval()
    (model if seed is None else fine_tune(model, seed)).save_pretrained(folder)
    return folder


def _with_copies(folder: Path, prefix: str) -> Path:
    """The same model as older versions of transformers stored it: the embedding under each of its names."""
    tensors = load_tensors(folder)
    names = [prefix + name for name in COPIES]
    if read_json(folder / "config.json")["tie_word_embeddings"]:
        names.append("lm_head.weight")
    for name in names:
        tensors.setdefault(name, tensors[f"{prefix}shared.weight"].clone())
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-copies"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _merged(folder: Path, base: Path, tuned: Path, edit: bool) -> Path:
    config = write_config(folder, recipe(base, tuned, parameters={"edit": edit}))
    out = folder / f"out-{edit}"
    assert our_command("plan", config).exit_code == 0
    result = our_command("merge", config, out, "--quiet")
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("copies", ["none", "base", "tuned"])
# Of T5, the key says how outputs are scaled; its head is tied in any case.
@pytest.mark.parametrize(
    ("family", "base_tied", "tuned_tied"),
    [("T5", True, True), ("BART", True, True), ("BART", True, False), ("BART", False, True)],
)
def test_the_result_is_tied_as_the_fine_tuned_model_is(family, base_tied, tuned_tied, copies, tmp_path):
    prefix = FAMILIES[family][1]
    base = _written(family, base_tied, tmp_path / "base")
    tuned = _written(family, tuned_tied, tmp_path / "tuned", seed=1)
    base = _with_copies(base, prefix) if copies == "base" else base
    tuned = _with_copies(tuned, prefix) if copies == "tuned" else tuned
    out = _merged(tmp_path, base, tuned, edit=False)
    assert load_tensors(out).keys() == load_tensors(tuned).keys()
    found, info = FAMILIES[family][0](tuned_tied).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = type(found).from_pretrained(tuned)
    assert all(torch.equal(found.state_dict()[name], t) for name, t in want.state_dict().items())
    same = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert same is (want.get_output_embeddings().weight is want.get_input_embeddings().weight)
    told, known = (read_json(folder / "config.json") for folder in (out, tuned))
    assert told["tie_word_embeddings"] == known["tie_word_embeddings"]


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_that_the_base_does_not_store_are_edited_like_the_embedding(family, tmp_path):
    """The base has the embedding once; what is tied to it in the fine-tuned model stays equal to it."""
    prefix = FAMILIES[family][1]
    base = _written(family, True, tmp_path / "base")
    tuned = _with_copies(_written(family, True, tmp_path / "tuned", seed=1), prefix)
    merged = load_tensors(_merged(tmp_path, base, tuned, edit=True))
    embedding = merged[f"{prefix}shared.weight"]
    assert not torch.equal(embedding, load_tensors(tuned)[f"{prefix}shared.weight"])
    for name in (*(prefix + copy for copy in COPIES), "lm_head.weight"):
        assert torch.equal(merged[name], embedding), name
