"""`mergekit-monosoup complete`: what stock mergekit takes from the base, put right afterwards."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import transformers
from beside import MESSAGES, our_command, read_json, write_embedder, write_files, write_pair
from checkpoints import build_model, edit_config, write_checkpoint
from commands import command_line, merge, recipe, run, write_config
from safetensors.torch import load_file

import mergekit_monosoup
from mergekit_monosoup.errors import InputError, MonoSoupError

pytestmark = pytest.mark.usefixtures("registered", "one_thread")


@pytest.fixture
def stock(tmp_path):
    """A base, a chat model of it, and what `mergekit-yaml` makes of the two."""
    base, tuned = write_pair(tmp_path)
    merge(tmp_path, recipe(base, tuned))
    return base, tuned, tmp_path / "out"


def test_the_command(stock):
    base, tuned, out = stock
    weights = (out / "model.safetensors").read_bytes()
    card = (out / "README.md").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    result = our_command("complete", out, "--from", tuned)
    assert result.exit_code == 0, result.output
    names = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    for name in (*names, "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
        assert f"  {name}\n" in result.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "README.md").read_bytes() == card
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.apply_chat_template(MESSAGES, tokenize=False) == "<user>the tin"
    assert transformers.AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6


def test_in_python(stock):
    _, tuned, out = stock
    names = mergekit_monosoup.complete(out, tuned)
    assert "chat_template.jinja" in names
    # Once more, there is nothing to change.
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    assert mergekit_monosoup.complete(out, str(tuned)) == names
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == before


def test_the_weights_decide_on_the_configuration(tmp_path):
    base, tuned = write_pair(tmp_path)
    edit_config(tuned, tie_word_embeddings=False, dtype="float32")
    merge(tmp_path, recipe(base, tuned, dtype="float16"))
    edit_config(tuned, quantization_config={"bits": 8})
    mergekit_monosoup.complete(tmp_path / "out", tuned)
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "float16")
    assert "quantization_config" not in config


def test_slices(tmp_path):
    base, tuned = write_pair(tmp_path, "llama")
    sources = [[{"model": str(m), "layer_range": r} for m in (tuned, base)] for r in ([0, 2], [1, 3])]
    merge(tmp_path, recipe(base, slices=[{"sources": part} for part in sources]))
    mergekit_monosoup.complete(tmp_path / "out", tuned)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert loaded.config.num_hidden_layers == 4
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("keys", [{"tokenizer": {"source": "base"}}, {"chat_template": "chatml"}], ids=str)
def test_what_the_recipe_says_of_tokenizer_and_template_stays(tmp_path, keys):
    base, tuned = write_pair(tmp_path)
    merge(tmp_path, recipe(base, tuned, **keys))
    out = tmp_path / "out"
    before = {name: (out / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    template = transformers.AutoTokenizer.from_pretrained(out).chat_template
    mergekit_monosoup.complete(out, tuned)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == template
    assert (out / "generation_config.json").read_bytes() == (tuned / "generation_config.json").read_bytes()
    if "tokenizer" in keys:
        assert before == {name: (out / name).read_bytes() for name in before}


def test_files_of_the_base_alone_go(stock, caplog):
    _, tuned, out = stock
    write_files(out, {"chat_template.json": "{}", "special_tokens_map.json": "{}", "notes.txt": "mine"})
    mergekit_monosoup.complete(out, tuned)
    assert not (out / "chat_template.json").exists()
    assert not (out / "special_tokens_map.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert caplog.text.count("removing") == 2


def test_modules_come_as_they_are(tmp_path, caplog):
    """There is no base to merge them with; without them, the model would not load."""
    _, tuned = write_embedder(tmp_path)
    out = shutil.copytree(tuned, tmp_path / "out", ignore=shutil.ignore_patterns("[0-9]_*", "modules.json"))
    mergekit_monosoup.complete(out, tuned)
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(out), device="cpu")
    assert loaded.encode("the tin").shape == (24,)
    dense = "2_Dense/model.safetensors"
    assert torch.equal(load_file(out / dense)["linear.weight"], load_file(tuned / dense)["linear.weight"])
    assert "2_Dense are those of" in caplog.text


class TestRefusals:
    def test_another_model(self, tmp_path, stock):
        other = write_checkpoint(tmp_path / "x", build_model("llama", hidden_size=48), torch.bfloat16)
        before = sorted((f.name, f.read_bytes()) for f in stock[2].iterdir() if f.is_file())
        with pytest.raises(InputError, match=r"do not go with these weights.*model.embed_tokens.weight"):
            mergekit_monosoup.complete(stock[2], other)
        assert sorted((f.name, f.read_bytes()) for f in stock[2].iterdir() if f.is_file()) == before

    def test_itself(self, stock):
        with pytest.raises(InputError, match="is the merged model itself"):
            mergekit_monosoup.complete(stock[2], stock[2])

    def test_no_weights(self, tmp_path, stock):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="holds no weights"):
            mergekit_monosoup.complete(tmp_path / "empty", stock[1])

    @pytest.mark.parametrize("name", ["not/there", "a+b+c", "not there"])
    def test_no_such_model(self, stock, name):
        with pytest.raises(MonoSoupError, match=name.replace("+", r"\+")):
            mergekit_monosoup.complete(stock[2], name)
        result = our_command("complete", stock[2], "--from", name)
        assert result.exit_code == 1
        assert "Traceback" not in result.output

    def test_a_folder_with_a_plus_in_its_name(self, tmp_path, stock):
        folder = shutil.copytree(stock[1], tmp_path / "a+b@c")
        assert "config.json" in mergekit_monosoup.complete(stock[2], folder)


@pytest.mark.slow
def test_the_stock_command_says_so_once(tmp_path):
    base, tuned = write_pair(tmp_path)
    file = write_config(tmp_path, recipe(base, tuned))
    said = run([*command_line("mergekit-yaml"), os.fspath(file), str(tmp_path / "out")], tmp_path).stdout
    assert said.count("mergekit-monosoup complete") == 1
    assert "chat_template.jinja" in said
    same = write_config(tmp_path, recipe(base, shutil.copytree(base, tmp_path / "same")))
    said = run([*command_line("mergekit-yaml"), os.fspath(same), str(tmp_path / "b")], tmp_path).stdout
    assert "mergekit-monosoup complete" not in said
