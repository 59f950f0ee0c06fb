"""Added, resized, padded and reordered vocabularies are merged without a word in the recipe."""

from __future__ import annotations

import logging
import sys

import oracle
import pytest
import torch
import transformers
from checkpoints import (
    LETTERS,
    VOCABULARY,
    build_model,
    build_tokenizer,
    fine_tune,
    load_tensors,
    write_checkpoint,
)
from commands import our_command, our_merge, recipe, run, write_config
from expectations import assert_merged
from loading import assert_same_model, loaded, output
from rounding import as_float64
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.checkpoint.vocabulary import Vocabularies
from mergekit_monosoup.report.reader import read_report

pytestmark = pytest.mark.usefixtures("registered", "one_thread")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADDED = ("<|im_start|>", "<|im_end|>", "<tool>")
PLAIN = {"parameters": {"alpha": 1.0, "edit": False}}


def resized(model, rows):
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def checkpoint(folder, model, extra=(), dtype=torch.float32):
    return write_checkpoint(folder, model, dtype, tokenizer=build_tokenizer(extra))


@pytest.fixture(params=["qwen3-tied", "qwen3-untied"])
def added(request, tmp_path):
    model = build_model(request.param)
    base = checkpoint(tmp_path / "base", model)
    tuned = resized(fine_tune(model, seed=1), VOCABULARY + 3)
    return base, checkpoint(tmp_path / "tuned", tuned, ADDED)


def test_added_tokens(tmp_path, added):
    base, tuned = added
    merged = our_merge(tmp_path, recipe(base, tuned))
    w1 = load_tensors(tuned)
    names = [name for name in (EMBEDDING, HEAD) if name in w1]
    for name in names:
        assert merged[name].shape == (VOCABULARY + 3, 40)
        assert torch.equal(merged[name][VOCABULARY:], w1[name][VOCABULARY:])
    shared = {name: t[:VOCABULARY] if name in names else t for name, t in merged.items()}
    w1 = {name: t[:VOCABULARY] if name in names else t for name, t in w1.items()}
    assert_merged(shared, load_tensors(base), [w1])
    records = {r.tensor: r for r in read_report(tmp_path / "out").records}
    for name in names:
        assert records[name].action == "edited"
        assert records[name].shape == (VOCABULARY + 3, 40)
        assert "3 rows the base does not have are kept" in records[name].reason
        assert records[name].figures["rows_kept"] == 3
    before, after = (output(loaded(f)) for f in (tuned, tmp_path / "out"))
    assert after.shape[-1] == VOCABULARY + 3
    assert 0 < (after - before).norm() / before.norm() < 0.1


def test_without_an_edit_it_is_the_fine_tuned_model(tmp_path, added):
    base, tuned = added
    our_merge(tmp_path, recipe(base, tuned, **PLAIN))
    assert_same_model(tmp_path / "out", tuned, torch.arange(VOCABULARY - 10, VOCABULARY + 3)[None])


def test_the_base_by_itself_for_the_rows_in_common(tmp_path, added):
    base, tuned = added
    merged = our_merge(tmp_path, recipe(base, tuned, parameters={"alpha": 0.0}))
    w0, w1 = load_tensors(base), load_tensors(tuned)
    assert torch.equal(merged[EMBEDDING], torch.cat([w0[EMBEDDING], w1[EMBEDDING][VOCABULARY:]]))


def test_the_dtype_of_the_recipe(tmp_path, added):
    base, tuned = added
    merged = our_merge(tmp_path, recipe(base, tuned, dtype="bfloat16"))
    new = load_tensors(tuned)[EMBEDDING][VOCABULARY:]
    assert torch.equal(merged[EMBEDDING][VOCABULARY:], new.bfloat16())


@pytest.mark.parametrize(("base_rows", "tuned_rows"), [(96, 128), (128, 96)])
def test_padding_of_different_length(tmp_path, base_rows, tuned_rows):
    """The same tokenizer; rows beyond it are matched by index."""
    model = build_model("qwen3-tied", vocab_size=base_rows)
    base = checkpoint(tmp_path / "base", model)
    tuned = checkpoint(tmp_path / "tuned", resized(fine_tune(model, seed=1), tuned_rows))
    merged = our_merge(tmp_path, recipe(base, tuned))
    w0, w1 = load_tensors(base)[EMBEDDING], load_tensors(tuned)[EMBEDDING]
    shared = min(base_rows, tuned_rows)
    exact = oracle.monosoup_weight(as_float64(w0[:shared]), [as_float64(w1[:shared])])
    torch.testing.assert_close(merged[EMBEDDING][:shared].double(), torch.from_numpy(exact))
    assert torch.equal(merged[EMBEDDING][shared:], w1[shared:])


def test_tokens_added_in_the_padding(tmp_path):
    """As many rows in both, but three of them are tokens in one alone."""
    model = build_model("qwen3-tied", vocab_size=VOCABULARY + 8)
    base = checkpoint(tmp_path / "base", model)
    tuned = checkpoint(tmp_path / "tuned", fine_tune(model, seed=1), ADDED)
    merged = our_merge(tmp_path, recipe(base, tuned, parameters={"alpha": 0.0}))
    w0, w1 = load_tensors(base)[EMBEDDING], load_tensors(tuned)[EMBEDDING]
    new = slice(VOCABULARY, VOCABULARY + 3)
    assert torch.equal(merged[EMBEDDING][new], w1[new])
    assert torch.equal(merged[EMBEDDING][VOCABULARY + 3 :], w0[VOCABULARY + 3 :])
    assert torch.equal(merged[EMBEDDING][:VOCABULARY], w0[:VOCABULARY])


def word_level(folder, model, words):
    vocabulary = {word: index for index, word in enumerate(("<unk>", *words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    return write_checkpoint(folder, model, torch.float32, tokenizer=tokenizer)


def test_tokens_in_another_order(tmp_path):
    words = list(LETTERS)
    model = build_model("qwen3-tied", vocab_size=27)
    base = word_level(tmp_path / "base", model, words)
    tuned_model = fine_tune(model, seed=1)
    order = torch.tensor([0, *range(26, 0, -1)])
    with torch.no_grad():
        tuned_model.model.embed_tokens.weight.copy_(tuned_model.model.embed_tokens.weight[order])
    tuned = word_level(tmp_path / "tuned", tuned_model, words[::-1])
    merged = our_merge(tmp_path, recipe(base, tuned))
    w0, w1 = (load_tensors(folder) for folder in (base, tuned))
    assert_merged(merged, w0 | {EMBEDDING: w0[EMBEDDING][order]}, [w1])


def test_several_fine_tuned_checkpoints_have_the_layout_of_the_first(tmp_path):
    model = build_model("qwen3-tied")
    base = checkpoint(tmp_path / "base", model)
    one, two = (fine_tune(model, seed=seed) for seed in (1, 2))
    first = checkpoint(tmp_path / "one", resized(one, VOCABULARY + 2), ADDED[:2])
    second = checkpoint(tmp_path / "two", resized(two, VOCABULARY + 2), ADDED[1:])
    merged = our_merge(tmp_path, recipe(base, first, second, parameters={"edit": False}))
    w1, w2 = (load_tensors(folder)[EMBEDDING] for folder in (first, second))
    mean = (w1[:VOCABULARY] + w2[:VOCABULARY]) / 2
    torch.testing.assert_close(merged[EMBEDDING][:VOCABULARY], mean)
    # The second has the token of the last row, too; the base has neither.
    assert torch.equal(merged[EMBEDDING][VOCABULARY:], w1[VOCABULARY:])


def test_without_tokenizers_by_index(tmp_path, added, caplog):
    base, tuned = added
    for folder in (base, tuned):
        for file in folder.glob("*token*"):
            file.unlink()
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, tuned, parameters={"alpha": 0.0}))
    assert caplog.text.count("matched by index") == 1
    w0, w1 = load_tensors(base)[EMBEDDING], load_tensors(tuned)[EMBEDDING]
    assert torch.equal(merged[EMBEDDING], torch.cat([w0, w1[VOCABULARY:]]))


def test_another_tokenizer_is_refused_with_a_remedy_that_keeps_it(tmp_path):
    model = build_model("qwen3-tied", vocab_size=27)
    base = word_level(tmp_path / "base", model, list(LETTERS))
    tuned = word_level(tmp_path / "tuned", fine_tune(model, seed=1), [f"word{i}" for i in range(26)])
    result = our_command(tmp_path, recipe(base, tuned))
    assert result.exit_code == 1
    assert f"tokenizer: {{source: {tuned}}}" in result.output
    assert "source: base" not in result.output
    assert not (tmp_path / "out").exists()


def test_other_methods_as_well(tmp_path, added):
    base, tuned = added
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in (tuned, base)]
    merged = our_merge(tmp_path, {"merge_method": "linear", "models": models})
    w0, w1 = load_tensors(base)[EMBEDDING], load_tensors(tuned)[EMBEDDING]
    torch.testing.assert_close(merged[EMBEDDING][:VOCABULARY], (w0 + w1[:VOCABULARY]) / 2)
    assert torch.equal(merged[EMBEDDING][VOCABULARY:], w1[VOCABULARY:])


def test_a_tokenizer_section_is_obeyed(tmp_path, added):
    base, tuned = added
    merged = our_merge(tmp_path, recipe(base, tuned, tokenizer={"source": "base"}))
    assert merged[EMBEDDING].shape[0] == VOCABULARY


def test_vocabularies_of_word_piece_files(tmp_path):
    """No tokenizer.json: transformers reads what there is, without running code."""
    models = []
    for name, words in (("base", LETTERS), ("tuned", "zy" + LETTERS[:24] + "!?")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=5 + len(words),
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
            )
        ).save_pretrained(folder)
        models.append(read_folder(str(folder), folder))
    shared = Vocabularies(models[::-1]).shared({str(models[1].name): 33, str(models[0].name): 31})
    assert shared.kept == 2
    assert shared.rows[1].tolist() == [*range(5), 30, 29, *range(5, 29)]


@pytest.mark.slow
def test_a_real_process(tmp_path, added):
    base, tuned = added
    file = write_config(tmp_path, recipe(base, tuned))
    command = [sys.executable, "-m", "mergekit_monosoup", "merge", str(file), "out"]
    done = run(command, tmp_path)
    assert "Traceback" not in done.stdout
    assert load_tensors(tmp_path / "out")[EMBEDDING].shape[0] == VOCABULARY + 3
