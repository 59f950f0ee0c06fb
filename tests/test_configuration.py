"""config.json of the result: in the form of the fine-tune's own, and true of the written weights."""

from __future__ import annotations

import json

import pytest
import transformers
from checkpoints import SIZES

from mergekit_monosoup.checkpoint.headers import StoredTensor
from mergekit_monosoup.merging.configuration import renumbered, write_config, written_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 5e5,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(rows=300, dtype="bfloat16", **more):
    shapes = {EMBEDDING: (rows, 8), HEAD: (rows, 8), "model.layers.0.mlp.up_proj.weight": (64, 8), **more}
    return {
        name: StoredTensor(name, shape, dtype, "model.safetensors")
        for name, shape in shapes.items()
        if shape is not None
    }


def tied(rows=300, dtype="bfloat16", **more):
    return tensors(rows, dtype, **{HEAD: None}, **more)


def test_nothing_to_put_right_changes_nothing():
    """Keys that are not known, their order and spelling stay; so do the bytes."""
    source = {"zz": [1, {"a": None}], **LLAMA, "rope_scaling": None, "auto_map": {"AutoModel": "m.M"}}
    right = written_config(source, tensors(), tensors())
    assert list(right.items()) == list(source.items())


def test_the_bytes_stay(tmp_path):
    source = json.dumps(LLAMA, indent=7).encode() + b"\n\n"
    write_config(tmp_path / "config.json", source, LLAMA, written_config(LLAMA, tensors(), tensors()))
    assert (tmp_path / "config.json").read_bytes() == source
    write_config(tmp_path / "config.json", source, LLAMA, LLAMA | {"vocab_size": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == LLAMA | {"vocab_size": 3}


class TestTied:
    def said(self, source, written, **options):
        return written_config(source, written, written, **options)

    def test_a_head_of_its_own(self):
        config = self.said(LLAMA | {"tie_word_embeddings": True}, tensors())
        assert config["tie_word_embeddings"] is False

    def test_no_head(self):
        assert self.said(LLAMA, tied())["tie_word_embeddings"] is True

    def test_a_head_that_is_the_embedding(self):
        for value in (True, False):
            source = LLAMA | {"tie_word_embeddings": value}
            assert self.said(source, tensors(), equal=lambda one, other: True) == source

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("model_type", ["llama", "gemma"])
    def test_a_silent_configuration(self, model_type, own):
        """llama is untied where nothing is said, gemma tied: only what would be wrong is written."""
        source = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | {"model_type": model_type}
        default = transformers.AutoConfig.for_model(model_type).tie_word_embeddings
        found = self.said(source, tensors() if own else tied()).get("tie_word_embeddings")
        assert found == (None if default is not own else not own)

    def test_of_a_class_that_nobody_knows(self):
        source = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | {"model_type": "own"}
        assert self.said(source, tensors())["tie_word_embeddings"] is False

    def test_nested(self):
        source = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "text_config": {"vocab_size": 300, "tie_word_embeddings": True},
        }
        config = self.said(source, tensors())
        assert config["text_config"]["tie_word_embeddings"] is False
        assert not transformers.AutoConfig.for_model(
            "qwen2_5_vl", text_config=config["text_config"]
        ).tie_word_embeddings
        both = source | {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
        config = self.said(both, tied())
        assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True

    def test_a_head_under_another_name(self):
        """InternLM 2 has `output.weight`; what cannot be told is left as it is."""
        names = {"output.weight": (300, 8)}
        assert self.said(LLAMA, tied(**names)) == LLAMA

    @pytest.mark.parametrize(
        "changes",
        [
            {"architectures": ["LlamaForSequenceClassification"]},
            {"architectures": ["LlamaModel"]},
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        ],
    )
    def test_where_the_key_says_nothing_of_a_head(self, changes):
        assert self.said(LLAMA | changes, tied()) == LLAMA | changes


class TestTypes:
    def test_as_most_are_written(self):
        written = tensors(dtype="float16")
        written["model.norm.weight"] = StoredTensor("n", (8,), "float32", "f")
        assert written_config(LLAMA, written, tensors())["torch_dtype"] == "float16"

    @pytest.mark.parametrize(
        ("version", "key"), [("5.1.0", "dtype"), ("4.50.0", "torch_dtype"), (None, "torch_dtype")]
    )
    def test_a_silent_configuration(self, version, key):
        source = {k: v for k, v in LLAMA.items() if k != "torch_dtype"} | {"transformers_version": version}
        assert written_config(source, tensors(), tensors()) == source | {key: "bfloat16"}

    def test_null_is_replaced_in_its_place(self):
        source = LLAMA | {"torch_dtype": None}
        assert written_config(source, tensors(), {})["torch_dtype"] == "bfloat16"

    def test_a_part_that_speaks_for_itself(self):
        source = LLAMA | {"text_config": {"dtype": "bfloat16"}, "vision_config": {"dtype": "float32"}}
        config = written_config(source, tensors(dtype="float16"), tensors())
        assert config["torch_dtype"] == config["text_config"]["dtype"] == "float16"
        assert config["vision_config"]["dtype"] == "float32"


class TestVocabulary:
    def test_other_rows(self):
        assert written_config(LLAMA, tensors(rows=303), tensors())["vocab_size"] == 303

    def test_before_is_not_known(self):
        assert written_config(LLAMA, tensors(rows=303), {})["vocab_size"] == 303

    def test_nested(self):
        source = {"text_config": {"vocab_size": 300}, "audio_config": {"vocab_size": 300}}
        config = written_config(source, tensors(rows=280), tensors())
        assert config["text_config"]["vocab_size"] == 280
        assert config["audio_config"]["vocab_size"] == 300

    def test_a_class_with_more_rows_than_it_says(self):
        """MusicGen's decoder has one row more than its vocabulary."""
        source = LLAMA | {"vocab_size": 299}
        assert written_config(source, tensors(), tensors()) == source


class TestLayers:
    def test_number_and_types(self):
        source = LLAMA | {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2, 3]}
        config = written_config(source, tensors(), tensors(), layers={"num_hidden_layers": [0, 1, 1, 2]})
        assert config["num_hidden_layers"] == 4
        assert config["layer_types"] == ["a", "b", "b", "c"]
        assert config["eos_token_id"] == [1, 2, 3]

    def test_nested(self):
        source = {"text_config": {"num_hidden_layers": 3, "layer_types": list("abc")}}
        layers = {"text_config.num_hidden_layers": [2], "vision_config.num_hidden_layers": [1]}
        config = written_config(source, tensors(), tensors(), layers=layers)
        assert config == {
            "text_config": {"num_hidden_layers": 1, "layer_types": ["c"]},
            "torch_dtype": "bfloat16",
        }

    def test_transformers_takes_it(self):
        source = transformers.Qwen3Config(**SIZES).to_dict()
        layers = {"num_hidden_layers": [0, 1, 1, 2]}
        config = written_config(source, tensors(), tensors(), layers=layers)
        assert transformers.Qwen3Config(**config).num_hidden_layers == 4


def test_what_no_longer_holds_is_gone():
    source = LLAMA | {
        "quantization_config": {"quant_method": "fp8"},
        "_name_or_path": "/home/somebody/model",
        "text_config": {"_name_or_path": "org/name", "quantization_config": {}},
    }
    config = written_config(source, tensors(), tensors())
    assert config == LLAMA | {"text_config": {"_name_or_path": "org/name"}}


def test_token_ids_of_another_vocabulary():
    content = {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": None,
        "num_beams": 2,
        "text_config": {"image_token_index": 5, "decoder_start_token_id": -1},
    }
    ids = {1: 11, 2: 12, 5: 15}
    assert renumbered(content, ids, 99) == {
        "bos_token_id": 11,
        "eos_token_id": [12],
        "pad_token_id": None,
        "num_beams": 2,
        "text_config": {"image_token_index": 15, "decoder_start_token_id": -1},
    }
    assert renumbered({"eos_token_id": 7, "pad_token_id": 7}, ids, 99) == {
        "eos_token_id": 99,
        "pad_token_id": None,
    }
    assert renumbered({"eos_token_id": [7, 8]}, ids, 99) == {"eos_token_id": 99}
