"""`mergekit-monosoup merge` hands back the fine-tuned checkpoint: all that lies beside its weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from beside import (
    CODE,
    MESSAGES,
    TEMPLATE,
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
    write_adapter,
    write_checkpoint,
)
from commands import ROOT, recipe, run, write_config
from hub_server import running_hub
from huggingface_hub import ModelCard

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

OURS = {"README.md", "mergekit_config.yml", "monosoup_report.jsonl", "monosoup_report.html"} | {
    "model.safetensors",
    "config.json",
}


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def names_in(folder):
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in files if not name.startswith("monosoup_figures/")}


def assert_brought(source, out, *names):
    assert names
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_a_chat_model(tmp_path, pair):
    base, tuned = pair
    out = our_merge(tmp_path, recipe(base, tuned))
    assert names_in(out) == OURS | names_in(tuned)
    assert_brought(tuned, out, *(names_in(tuned) - {"model.safetensors"}))
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.apply_chat_template(MESSAGES, tokenize=False) == "<user>the tin"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.temperature == 0.6
    assert model.generation_config.eos_token_id == [2, 3]
    card = ModelCard.load(out / "README.md").content
    assert str(tmp_path) not in card


def test_settings_that_transformers_would_not_save(tmp_path, pair):
    """`do_sample: false` beside a temperature makes a save by transformers fail."""
    base, tuned = pair
    write_files(tuned, {"generation_config.json": '{"do_sample": false, "temperature": 0.7}'})
    assert_brought(tuned, our_merge(tmp_path, recipe(base, tuned)), "generation_config.json")


def test_configuration_in_the_form_of_the_fine_tuned_file(tmp_path, pair):
    """transformers 5 would write `rope_parameters`, which engines that read `rope_theta` do not know."""
    base, tuned = pair
    config = read_json(tuned / "config.json")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "own_key": [1]}
    config["torch_dtype"] = config.pop("dtype")
    write_files(tuned, {"config.json": json.dumps(config, indent=3)})
    assert_brought(tuned, our_merge(tmp_path, recipe(base, tuned)), "config.json")


def test_training_state_and_other_weights_stay_behind(tmp_path, pair):
    base, tuned = pair
    write_files(
        tuned,
        {
            "LICENSE": "free",
            "notes/a.txt": "a",
            "preprocessor_config.json": "{}",
            "trainer_state.json": "{}",
            "checkpoint-10/config.json": "{}",
            "onnx/model.onnx": "x",
            "consolidated.safetensors": "no safetensors at all",
            ".env": "TOKEN=secret",
            "monosoup_figures/old.png": "x",
        },
    )
    torch.save({"step": 1}, tuned / "optimizer.pt")
    out = our_merge(tmp_path, recipe(base, tuned))
    assert_brought(tuned, out, "LICENSE", "notes/a.txt", "preprocessor_config.json")
    plain = {"LICENSE", "notes/a.txt", "preprocessor_config.json", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names_in(out) == OURS | plain | tokenizer
    assert not (out / "monosoup_figures" / "old.png").exists()


def test_what_is_unusual_is_said_once(tmp_path, pair, caplog):
    base, tuned = pair
    write_files(tmp_path, {"secret": "s"})
    os.symlink(tmp_path / "secret", tuned / "notes.txt")
    our_merge(tmp_path, recipe(base, tuned))
    lines = [r.getMessage() for r in caplog.records if "left behind" in r.getMessage() and r.levelno > 20]
    assert lines == [f"notes.txt of {tuned} is left behind: a link out of the folder"]


def test_the_licence_carries_over(tmp_path, pair):
    base, tuned = pair
    text = (
        "---\nlicense: cc-by-4.0\nlanguage:\n- de\ntags:\n- mine\npipeline_tag: text-generation\n---\n# Mine"
    )
    write_files(tuned, {"README.md": f"{text}\n/home/somebody/runs\n"})
    card = ModelCard.load(our_merge(tmp_path, recipe(base, tuned)) / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["pipeline_tag"]) == (
        "cc-by-4.0",
        ["de"],
        "text-generation",
    )
    assert "mine" not in data["tags"]
    assert "/home/" not in card.content


def test_the_card_calls_folders_by_their_names(tmp_path, pair):
    base, tuned = pair
    other = shutil.copytree(tuned, tmp_path / "again" / "tuned")
    config = recipe(base, tuned, other, merge_method="sfgs")
    out = our_merge(tmp_path, config)
    card = ModelCard.load(out / "README.md")
    assert str(tmp_path) not in card.content
    assert "* tuned\n" in card.content
    assert "* tuned-2\n" in card.content
    assert "base_model: base" in card.content
    assert "base_model" not in card.data.to_dict()
    # The record itself can be run again.
    assert str(tuned) in (out / "mergekit_config.yml").read_text()


class TestCode:
    def with_code(self, tuned):
        files = {"configuration_own.py": CODE, "modeling_own.py": CODE, "tokenization_own.py": CODE}
        write_files(tuned, files)
        names = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
        edit_config(tuned, auto_map=names)
        content = read_json(tuned / "tokenizer_config.json")
        content["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
        write_files(tuned, {"tokenizer_config.json": json.dumps(content)})
        return sorted(files)

    def test_it_is_copied_and_never_run(self, tmp_path, pair):
        base, tuned = pair
        names = self.with_code(tuned)
        file = write_config(tmp_path, recipe(base, tuned, chat_template="chatml"))
        home = {"HF_HOME": str(tmp_path / "hub")}
        program = [os.fspath(ROOT / ".venv" / "bin" / "mergekit-monosoup")]
        if not os.path.exists(program[0]):
            program = ["python", "-m", "mergekit_monosoup"]
        out = tmp_path / "out"
        run([*program, "plan", str(file)], tmp_path, home)
        run([*program, "merge", str(file), str(out), "--quiet"], tmp_path, home)
        run([*program, "complete", str(out), "--from", str(tuned)], tmp_path, home)
        run([*program, "verify", str(out)], tmp_path, home)
        assert_brought(tuned, out, *names)
        assert read_json(out / "config.json")["auto_map"]
        assert not list(tmp_path.rglob("*code-ran*"))

    def test_push_does_not_run_it(self, tmp_path, pair):
        from mergekit_monosoup.publishing import check_folder

        self.with_code(pair[1])
        out = our_merge(tmp_path, recipe(*pair))
        assert set(check_folder(out).files) >= {"modeling_own.py"}
        assert not list(tmp_path.rglob("*code-ran*"))


class TestTokenizer:
    def test_a_checkpoint_without_one_has_that_of_the_base(self, tmp_path, pair, caplog):
        base, tuned = pair
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tuned / name).unlink()
        out = our_merge(tmp_path, recipe(base, tuned))
        assert_brought(base, out, "tokenizer.json", "tokenizer_config.json")
        # Its template is its own all the same.
        assert_brought(tuned, out, "chat_template.jinja")
        assert caplog.text.count("has no tokenizer") == 1

    def test_no_copy(self, tmp_path, pair):
        out = our_merge(tmp_path, recipe(*pair), "--no-copy-tokenizer")
        assert not (out / "tokenizer.json").exists()
        assert (out / "generation_config.json").exists()

    @pytest.mark.parametrize("inside", [True, False])
    def test_a_chat_template_of_the_recipe_wins(self, tmp_path, pair, inside):
        base, tuned = pair
        if inside:
            (tuned / "chat_template.jinja").unlink()
            content = read_json(tuned / "tokenizer_config.json") | {"chat_template": TEMPLATE}
            write_files(tuned, {"tokenizer_config.json": json.dumps(content)})
        own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        out = our_merge(tmp_path, recipe(base, tuned, chat_template=own))
        words = transformers.AutoTokenizer.from_pretrained(out)
        assert words.apply_chat_template(MESSAGES, tokenize=False) == "[the tin]"
        assert (out / "chat_template.jinja").exists() is not inside
        assert_brought(tuned, out, "tokenizer.json")
        if not inside:
            assert_brought(tuned, out, "tokenizer_config.json")

    def test_a_tokenizer_of_the_recipe_wins(self, tmp_path):
        """Its ids count then: what the fine-tuned model ends with is another number in the base's."""
        model = build_model("qwen3-tied")
        base = write_checkpoint(tmp_path / "base", model, torch.bfloat16)
        bigger = fine_tune(model, seed=1)
        bigger.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        words = build_tokenizer(extra=("<tool>", "<end>"))
        words.chat_template = TEMPLATE
        tuned = write_checkpoint(tmp_path / "tuned", bigger, torch.bfloat16, tokenizer=words)
        end = words.convert_tokens_to_ids("<end>")
        edit_config(tuned, eos_token_id=end, pad_token_id=3)
        write_files(tuned, {"generation_config.json": json.dumps({"eos_token_id": [2, end], "top_k": 9})})
        out = our_merge(tmp_path, recipe(base, tuned, tokenizer={"source": "base"}))
        config = read_json(out / "config.json")
        assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (VOCABULARY, 2, 3)
        assert read_json(out / "generation_config.json") == {"eos_token_id": [2], "top_k": 9}
        assert len(transformers.AutoTokenizer.from_pretrained(out)) == VOCABULARY

    def test_an_adapter_has_its_own(self, tmp_path, pair):
        base, _ = pair
        adapter = write_adapter(tmp_path / "adapter", base)
        words = build_tokenizer()
        words.chat_template = TEMPLATE
        words.save_pretrained(adapter)
        write_files(adapter, {"README.md": "---\nlicense: mit\n---\n"})
        out = our_merge(tmp_path, recipe(base, f"{base}+{adapter}"))
        assert_brought(adapter, out, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
        assert_brought(base, out, "generation_config.json", "config.json")
        assert not (out / "adapter_config.json").exists()
        assert ModelCard.load(out / "README.md").data.license == "mit"


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
