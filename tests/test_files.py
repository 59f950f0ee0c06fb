"""`mergekit-monosoup merge` hands back the fine-tuned checkpoint: all that lies beside its weights."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import transformers
from beside import (
    CODE,
    MESSAGES,
    TEMPLATE,
    our_merge,
    read_json,
    write_files,
    write_pair,
)
from checkpoints import (
    VOCABULARY,
    build_model,
    build_tokenizer,
    edit_config,
    fine_tune,
    write_adapter,
    write_checkpoint,
)
from commands import ROOT, recipe, run, write_config
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
