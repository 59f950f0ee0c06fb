"""Whose files a merge hands back, and for models of what kinds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from beside import (
    CODE,
    MESSAGES,
    our_command,
    our_merge,
    read_json,
    write_files,
    write_pair,
    write_vision_pair,
)
from checkpoints import (
    VOCABULARY,
    build_model,
    build_tokenizer,
    edit_config,
    fine_tune,
    load_tensors,
    write_checkpoint,
)
from commands import recipe, run, write_config
from hub_server import running_hub
from huggingface_hub import ModelCard
from test_files import OURS, assert_brought, names_in

pytestmark = pytest.mark.usefixtures("registered", "one_thread")


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


class TestSource:
    def test_the_first_of_several(self, tmp_path, pair):
        base, tuned = pair
        second = shutil.copytree(tuned, tmp_path / "second")
        write_files(second, {"chat_template.jinja": "second"})
        assert_brought(tuned, our_merge(tmp_path, recipe(base, tuned, second)), "chat_template.jinja")
        out = our_merge(tmp_path / "b", recipe(base, tuned, second), "--files-from", str(second))
        assert_brought(second, out, "chat_template.jinja")

    def test_the_base(self, tmp_path, pair):
        base, tuned = pair
        out = our_merge(tmp_path, recipe(base, tuned), "--files-from", "base")
        assert not (out / "chat_template.jinja").exists()
        assert_brought(base, out, "generation_config.json", "config.json", "tokenizer.json")

    def test_without_a_base(self, tmp_path, pair):
        models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in reversed(pair)]
        out = our_merge(tmp_path, {"merge_method": "linear", "models": models})
        assert_brought(pair[1], out, "chat_template.jinja", "generation_config.json")

    @pytest.mark.parametrize("name", ["no/such-model", "a/b/c", "x+y+z"])
    def test_a_name_that_is_none(self, tmp_path, pair, name):
        """It shows before anything is computed."""
        file = write_config(tmp_path, recipe(*pair))
        result = our_command("merge", file, tmp_path / "out", "--quiet", "--files-from", name)
        assert result.exit_code == 1
        assert name in result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()
        planned = our_command("plan", file, "--files-from", name)
        assert planned.exit_code == 1
        assert name in planned.output

    def test_a_base_that_is_not_named(self, tmp_path, pair):
        config = {"merge_method": "passthrough", "models": [{"model": str(pair[1])}]}
        result = our_command(
            "merge", write_config(tmp_path, config), tmp_path / "out", "--files-from", "base"
        )
        assert result.exit_code == 1
        assert "names no base_model" in result.output

    def test_another_model(self, tmp_path, pair):
        other = write_checkpoint(tmp_path / "other", build_model("llama", hidden_size=48), torch.bfloat16)
        file = write_config(tmp_path, recipe(*pair))
        result = our_command("merge", file, tmp_path / "out", "--quiet", "--files-from", other)
        assert result.exit_code == 1
        assert "do not go with these weights" in result.output
        assert not (tmp_path / "out").exists()
        planned = our_command("plan", file, "--files-from", other)
        assert planned.exit_code == 1
        assert "do not go with these weights" in planned.output


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_or_not_the_files_decide(tmp_path, says, is_tied):
    base, tuned = write_pair(tmp_path, "qwen3-tied" if is_tied else "qwen3-untied")
    edit_config(tuned, tie_word_embeddings=says)
    out = our_merge(tmp_path, recipe(base, tuned))
    assert ("lm_head.weight" in load_tensors(out)) is not is_tied
    assert read_json(out / "config.json")["tie_word_embeddings"] is is_tied
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same is is_tied


def test_slices_of_layers_with_types(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention"]
    base, tuned = write_pair(tmp_path, "qwen3-tied", layer_types=types)
    ranges = ([0, 2], [1, 3])
    sources = [[{"model": str(m), "layer_range": r} for m in (tuned, base)] for r in ranges]
    out = our_merge(tmp_path, recipe(base, slices=[{"sources": part} for part in sources]))
    config = read_json(out / "config.json")
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == [types[i] for i in (0, 1, 1, 2)]
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.layer_types == config["layer_types"]
    assert_brought(tuned, out, "chat_template.jinja")


def test_out_dtype(tmp_path, pair):
    out = our_merge(tmp_path, recipe(*pair, out_dtype="float16"))
    config = read_json(out / "config.json")
    assert config["dtype"] == "float16"
    rest = read_json(pair[1] / "config.json") | {"dtype": "float16"}
    assert config == rest


def test_a_vision_language_model(tmp_path):
    base, tuned = write_vision_pair(tmp_path)
    out = our_merge(tmp_path, recipe(base, tuned))
    assert names_in(out) == OURS | names_in(tuned)
    assert_brought(tuned, out, *(names_in(tuned) - {"model.safetensors"}))
    ours, theirs = (transformers.AutoProcessor.from_pretrained(f) for f in (out, tuned))
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.image_processor.crop_size["height"] == 16
    assert ours.apply_chat_template(MESSAGES, tokenize=False) == "<user>the tin"


def test_a_model_on_the_hub(tmp_path, pair):
    """Only these files are asked for beside the weights of the merge."""
    base, tuned = pair
    files = {"optimizer.pt": "x" * 999, "own.py": CODE, "README.md": "---\nlicense: mit\n---\n", ".env": "x"}
    write_files(tuned, files)
    with running_hub() as hub:
        hub.publish("org/base", base)
        hub.publish("org/tuned", tuned)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        program = "from mergekit_monosoup.cli import main; main()"
        file = write_config(tmp_path, recipe("org/base", "org/tuned"))
        command = [sys.executable, "-c", program, "merge", str(file), str(tmp_path / "out"), "--quiet"]
        run(command, tmp_path, environment)
        asked = {r.rsplit("/", 1)[1] for r in hub.requests if r.startswith("GET /org/tuned/resolve")}
        assert asked >= {"chat_template.jinja", "own.py", "README.md"}
        assert not asked & {"optimizer.pt", ".env", ".gitattributes"}
        assert_brought(tuned, tmp_path / "out", "chat_template.jinja", "own.py", "generation_config.json")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.license == "mit"
        assert "[org/tuned](https://huggingface.co/org/tuned)" in card.content
        # Off the network, the cache serves.
        program = (
            "from mergekit_monosoup.checkpoint.hub import fetch_companions as f; print(f('org/tuned', None))"
        )
        offline = run([sys.executable, "-c", program], tmp_path, environment | {"HF_HUB_OFFLINE": "1"})
        assert (Path(offline.stdout.splitlines()[-1]) / "chat_template.jinja").is_file()


def test_a_classifier_over_a_plain_base(tmp_path):
    """Architecture, labels and head are those of the fine-tuned model, whatever the base's class is."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        id2label={0: "no", 1: "yes", 2: "perhaps"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    base = write_checkpoint(tmp_path / "base", model.bert, torch.float32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, seed=1), torch.float32)
    out = our_merge(tmp_path, recipe(base, tuned))
    assert read_json(out / "config.json") == read_json(tuned / "config.json")
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.id2label[2] == "perhaps"
    assert torch.equal(loaded.classifier.weight, load_tensors(tuned)["classifier.weight"])


def test_a_text_only_model_over_a_vision_language_base(tmp_path):
    """The result has the base's vision tower; so it needs the base's processor, with the own template."""
    base, _ = write_vision_pair(tmp_path)
    language = transformers.LlavaForConditionalGeneration.from_pretrained(base).model.language_model
    config = transformers.LlamaConfig(**language.config.to_dict())
    model = transformers.LlamaForCausalLM(config)
    model.model.load_state_dict(language.state_dict())
    model.lm_head.weight.data = load_tensors(base)["language_model.lm_head.weight"].clone()
    words = build_tokenizer(extra=("<image>",))
    words.chat_template = "own {% for m in messages %}{{ m.content }}{% endfor %}"
    tuned = write_checkpoint(tmp_path / "text", fine_tune(model, seed=1), torch.float32, tokenizer=words)
    out = our_merge(tmp_path, recipe(base, tuned))
    assert read_json(out / "config.json") == read_json(base / "config.json")
    assert_brought(base, out, "processor_config.json")
    assert_brought(tuned, out, "chat_template.jinja", "generation_config.json")
    assert transformers.AutoProcessor.from_pretrained(out).apply_chat_template(MESSAGES, tokenize=False)


def test_a_type_that_only_its_own_code_knows(tmp_path):
    """Weights and configuration are merged all the same, and nothing is run."""
    pair = write_pair(tmp_path, "llama")
    for folder in pair:
        write_files(folder, {"configuration_own.py": CODE})
        names = {"AutoConfig": "configuration_own.Own"}
        edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=names)
    out = our_merge(tmp_path, recipe(*pair))
    assert_brought(pair[1], out, "config.json", "configuration_own.py", "chat_template.jinja")
    assert set(load_tensors(out)) == set(load_tensors(pair[1]))
    assert not list(tmp_path.rglob("*code-ran*"))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert "own" not in CONFIG_MAPPING


def test_folders_that_are_called_base(tmp_path, monkeypatch):
    """As a tokenizer's source may be called, too: off the network, nobody is asked about them."""
    from mergekit_monosoup.merging.public_recipe import PublicRecipe

    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = PublicRecipe("base_model: base\ntokenizer_source: base\n").content
    assert shown["base_model"] != "base"
    assert shown["tokenizer_source"] == "base"
