"""Which files of a folder belong to a model, and why others stay behind."""

from __future__ import annotations

import os

import pytest
from beside import write_files

from mergekit_monosoup.checkpoint import companions as beside
from mergekit_monosoup.checkpoint.companions import (
    LARGEST,
    LEFT_BEHIND,
    TAKEN,
    companions,
    difference,
    is_taken,
    kind_of,
    weight_folders,
)

LEFT = {
    "training state and logs": [
        "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state.pth",
        "rng_state_0.pth", "training_args.bin", "runs/Mar01_host/events.out.tfevents.1", "latest",
        "checkpoint-500/model.safetensors", "checkpoint-500/config.json", "zero_to_fp32.py",
        "global_step500/mp_rank_00_model_states.pt", "wandb/run-1/files/config.yaml", "train_results.json",
        "pytorch_model_fsdp_0/__0_0.distcp", "random_states_0.pkl",
    ],
    "weights and their index": [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
        "model.fp16.safetensors", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
    ],
    "adapters": ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"],
    "weights in other formats": [
        "consolidated.safetensors", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack",
        "rust_model.ot",
        "model.ckpt.index", "model-Q4_K_M.gguf", "onnx/model.onnx", "onnx/config.json", "model.onnx",
        "openvino/openvino_model.xml", "coreml/float32_model.mlpackage/Manifest.json", "original/params.json",
        "value_head.pt", "non_lora_trainables.bin", "saved_model.pb",
    ],
    "settings of a quantisation": ["quantize_config.json", "hf_quant_config.json"],
    "model card": ["README.md"],
    "records of an earlier merge": [
        "mergekit_config.yml", "monosoup_report.jsonl", "monosoup_figures/coefficients.png",
    ],
    "version control, caches, hidden files": [
        ".gitattributes", ".git/config", ".cache/huggingface/download/x.lock", "__pycache__/x.pyc",
        ".DS_Store", ".env", ".ipynb_checkpoints/x.ipynb",
    ],
}  # fmt: skip
WITH_THE_MODEL = {
    "configuration": ["config.json"],
    "tokenizer and chat templates": [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json",
        "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "vocab.txt",
        "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
    ],
    "generation settings": ["generation_config.json"],
    "processors": ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"],
    "custom code (`auto_map`)": ["modeling_own.py", "code/helper.py"],
    "modules of sentence-transformers": [
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        "1_Pooling/config.json", "2_Dense/config.json",
    ],
    "any other file up to 64 MB": ["LICENSE", "NOTICE", "labels.txt", "scheduler_config.json", "img/a.png"],
}  # fmt: skip


def test_every_kind_has_its_examples():
    assert set(LEFT) == {kind.what for kind in LEFT_BEHIND}
    taken = {kind.what for kind in (beside.CONFIGURATION, *TAKEN, beside.OTHER)}
    assert set(WITH_THE_MODEL) == taken
    for kind in (*LEFT_BEHIND, *TAKEN):
        assert kind.why


@pytest.mark.parametrize(
    ("what", "taken", "names"),
    [(k, False, v) for k, v in LEFT.items()] + [(k, True, v) for k, v in WITH_THE_MODEL.items()],
)
def test_kinds(what, taken, names):
    assert {name: (kind_of(name)[0].what, kind_of(name)[1]) for name in names} == dict.fromkeys(
        names, (what, taken)
    )


def test_a_folder(tmp_path):
    files = {name: "x" for names in (*LEFT.values(), *WITH_THE_MODEL.values()) for name in names}
    files["modules.json"] = '[{"path": ""}, {"path": "2_Dense"}, {"path": "../out"}, {"path": "/etc"}]'
    write_files(tmp_path, files)
    found = companions(tmp_path)
    assert set(found.taken) == {name for names in WITH_THE_MODEL.values() for name in names}
    assert not found.unusual
    # Folders of tools are not gone through; all else has its reason.
    hidden = {name for name in LEFT["version control, caches, hidden files"] if "/" in name}
    assert set(found.left) == {name for names in LEFT.values() for name in names} - hidden
    assert weight_folders(tmp_path) == ["2_Dense"]


def test_weights_that_no_modules_json_names_are_spoken_of(tmp_path):
    write_files(tmp_path, {"tower/model.safetensors": "x", "tower/config.json": "{}"})
    found = companions(tmp_path)
    assert found.taken == ("tower/config.json",)
    assert found.unusual == ("tower/model.safetensors",)
    assert "modules.json" in found.left["tower/model.safetensors"]


def test_large_files(tmp_path):
    for name in ("video.mp4", "tokenizer.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(LARGEST + 1)
    found = companions(tmp_path)
    assert found.taken == ("tokenizer.json",)
    assert found.left == {"video.mp4": "larger than 64 MB"}
    assert found.unusual == ("video.mp4",)
    assert is_taken("video.mp4", LARGEST)
    assert is_taken("video.mp4")


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    model = write_files(tmp_path / "model", {"vocab.txt": "a", "LICENSE": "free"})
    write_files(tmp_path, {"secret": "s", "data/more": "m"})
    os.symlink("LICENSE", model / "COPYING")
    os.symlink(tmp_path / "secret", model / "notes.txt")
    os.symlink(tmp_path / "data", model / "data")
    os.symlink("nowhere", model / "broken")
    found = companions(model)
    assert found.taken == ("COPYING", "LICENSE", "vocab.txt")
    assert set(found.unusual) == {"notes.txt", "data"}
    assert found.left["notes.txt"] == "a link out of the folder"


def test_the_cache_of_the_hub_is_made_of_links(tmp_path):
    cache = tmp_path / "models--org--name"
    write_files(cache, {"blobs/abc": "{}", "snapshots/0123/LICENSE": "free"})
    snapshot = cache / "snapshots" / "0123"
    os.symlink("../../blobs/abc", snapshot / "config.json")
    assert companions(snapshot).taken == ("LICENSE", "config.json")


def test_routers_hold_modules_of_their_own(tmp_path):
    files = {
        "modules.json": '[{"path": "0_Router"}]',
        "0_Router/query_0_Dense/model.safetensors": "x",
        "0_Router/doc_0_Dense/pytorch_model.bin": "x",
    }
    write_files(tmp_path, files)
    assert weight_folders(tmp_path) == ["0_Router/doc_0_Dense", "0_Router/query_0_Dense"]
    assert not companions(tmp_path).unusual


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"path": 3}]', '[{"path": "gone"}]'])
def test_a_modules_json_of_no_use(tmp_path, content):
    write_files(tmp_path, {"modules.json": content})
    assert weight_folders(tmp_path) == []


class TestDifference:
    def pair(self, tmp_path, base, tuned):
        return write_files(tmp_path / "base", base), write_files(tmp_path / "tuned", tuned)

    def test_what_every_save_changes_is_none(self, tmp_path):
        one = {"config.json": '{"a": 1, "transformers_version": "4.50"}', "generation_config.json": "{}"}
        two = {
            "config.json": '{"a": 1, "transformers_version": "5.0", "_name_or_path": "x"}',
            "generation_config.json": '{"_from_model_config": true}',
            "LICENSE": "free",
            "optimizer.pt": "x",
        }
        assert difference(*self.pair(tmp_path, one, two)) is None

    def test_own_files(self, tmp_path):
        one = {"tokenizer.json": "{}", "config.json": "{}"}
        two = {"tokenizer.json": '{"a": 1}', "config.json": '{"a": 2}', "chat_template.jinja": "x"}
        found = difference(*self.pair(tmp_path, one, two))
        assert found == "its own chat_template.jinja, config.json, tokenizer.json"

    def test_many(self, tmp_path):
        names = [name for name in WITH_THE_MODEL["tokenizer and chat templates"] if name.endswith(".json")]
        found = difference(*self.pair(tmp_path, {}, dict.fromkeys(names, "{}")))
        assert found.endswith(f"and {len(names) - 4} more")

    def test_an_adapter(self, tmp_path):
        one = {"tokenizer.json": "{}", "config.json": "{}", "generation_config.json": "{}"}
        two = {"adapter_config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x", "a.py": ""}
        assert difference(*self.pair(tmp_path, one, two)) == "its own chat_template.jinja"
        assert difference(*self.pair(tmp_path / "b", one, {"adapter_config.json": "{}"})) is None

    def test_what_only_the_base_has(self, tmp_path):
        one = {"tokenizer.json": "{}", "chat_template.jinja": "x"}
        assert difference(*self.pair(tmp_path, one, {"tokenizer.json": "{}"})) == "no chat_template.jinja"
