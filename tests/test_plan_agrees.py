"""`plan` and `merge` end alike: what would fail is said before the merge begins, and nothing else is."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoints import (
    build_model,
    copy_as_bin,
    copy_with_tensors,
    edit_config,
    load_tensors,
    write_adapter,
    write_checkpoint,
)
from click.testing import CliRunner
from commands import forget_loaders, recipe
from safetensors.torch import load_file, save_file

from mergekit_monosoup.cli import main

pytestmark = pytest.mark.usefixtures("registered")

MATRIX = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def changed(models, folder, **tensors):
    """The fine-tuned checkpoint with some tensors in the place of others; None leaves one out."""
    held = load_tensors(models.tuned[0]) | {name.replace("__", "."): t for name, t in tensors.items()}
    return copy_with_tensors(
        models.tuned[0], folder / "changed", {k: v for k, v in held.items() if v is not None}
    )


def with_card(source, folder, name, base):
    copy = copy_with_tensors(source, folder / name, load_tensors(source))
    (copy / "README.md").write_text(f"---\nbase_model: {base}\ntags: [x]\n---\n# A model\n")
    return copy


def without(source, folder, pattern):
    copy = copy_with_tensors(source, folder / "without", load_tensors(source))
    for file in copy.glob(pattern):
        file.unlink()
    return copy


def tampered(folder, base, change):
    adapter = write_adapter(folder / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def adapted(models, adapter):
    return recipe(models.base, f"{models.base}+{adapter}")


def other_base(folder):
    return write_checkpoint(folder / "other", build_model("qwen3-tied", seed=99), torch.bfloat16)


def renamed(tensors):
    for name in [n for n in tensors if "q_proj" in n]:
        tensors[name.replace("q_proj", "query")] = tensors.pop(name)


def wider(tensors):
    for name in [n for n in tensors if "q_proj" in n and "lora_A" in n]:
        tensors[name] = torch.zeros(4, 44)


def sliced(models, count):
    parts = [
        {"sources": [{"model": str(m), "layer_range": [0, count]} for m in (models.base, models.tuned[0])]}
    ]
    return {"merge_method": "monosoup", "base_model": str(models.base), "slices": parts}


def model_stock(*models):
    return {
        "merge_method": "model_stock_stable",
        "base_model": str(models[0]),
        "models": [{"model": str(m)} for m in models[1:]],
    }


# name -> (recipe made of the models and a folder, options of merge, exit status, part of what is said)
CASES = {
    "sound": (lambda m, f: recipe(m.base, m.tuned[0]), [], 0, ""),
    "two": (lambda m, f: recipe(m.base, *m.tuned), [], 0, ""),
    "pickled": (lambda m, f: recipe(m.base, copy_as_bin(m.tuned[0], f / "bin")), [], 0, ""),
    "unrelated": (lambda m, f: recipe(other_base(f), m.tuned[0]), [], 1, "may not be the base"),
    "unrelated, pickled": (
        lambda m, f: recipe(copy_as_bin(other_base(f), f / "bin"), m.tuned[0]),
        [],
        1,
        "may not be the base",
    ),
    "unrelated, forced": (lambda m, f: recipe(other_base(f), m.tuned[0]), ["--force-base"], 0, ""),
    "swapped": (
        lambda m, f: recipe(with_card(m.tuned[0], f, "tuned7", m.base), m.base),
        [],
        1,
        "swapped",
    ),
    "swapped, forced": (
        lambda m, f: recipe(with_card(m.tuned[0], f, "tuned7", m.base), m.base),
        ["--force-base"],
        0,
        "",
    ),
    "a copy of the base": (
        lambda m, f: recipe(m.base, copy_with_tensors(m.base, f / "copy", load_tensors(m.base))),
        [],
        0,
        "no update to edit",
    ),
    "integers": (
        lambda m, f: recipe(m.base, changed(m, f, **{MATRIX: torch.zeros(72, 40, dtype=torch.int8)})),
        [],
        1,
        "dequantise",
    ),
    "integers that no layer has": (
        lambda m, f: recipe(m.base, changed(m, f, extra__qweight=torch.zeros(8, 8, dtype=torch.int32))),
        [],
        1,
        "dequantise",
    ),
    "quantised by its configuration": (
        lambda m, f: recipe(
            m.base,
            edit_config(copy_as_bin(m.tuned[0], f / "bin"), quantization_config={"quant_method": "gptq"}),
        ),
        [],
        1,
        "dequantise",
    ),
    "a tensor missing": (lambda m, f: recipe(m.base, changed(m, f, **{MATRIX: None})), [], 1, MATRIX),
    "another shape": (
        lambda m, f: recipe(m.base, changed(m, f, **{MATRIX: torch.zeros(72, 39)})),
        [],
        1,
        MATRIX,
    ),
    "a leftover buffer": (
        lambda m, f: recipe(
            m.base, changed(m, f, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
        ),
        [],
        0,
        "inv_freq",
    ),
    "adapter": (lambda m, f: adapted(m, write_adapter(f / "adapter", m.base)), ["cache"], 0, ""),
    "adapter of another base": (
        lambda m, f: adapted(m, tampered(f, m.base, renamed)),
        ["cache"],
        1,
        "query",
    ),
    "adapter of another shape": (lambda m, f: adapted(m, tampered(f, m.base, wider)), ["cache"], 1, "q_proj"),
    "adapter with a factor missing": (
        lambda m, f: adapted(m, tampered(f, m.base, lambda t: t.pop(next(k for k in t if "lora_B" in k)))),
        ["cache"],
        1,
        "lora_B",
    ),
    "no adapter": (lambda m, f: adapted(m, f / "nowhere"), ["cache"], 1, "nowhere"),
    "no model": (lambda m, f: recipe(m.base, f / "nowhere"), [], 1, "nowhere"),
    "an address": (
        lambda m, f: recipe(m.base, "https://huggingface.co/user/name/tree/main"),
        [],
        1,
        "user/name@main",
    ),
    "a tokenizer": (lambda m, f: recipe(m.base, m.tuned[0], tokenizer={"source": "base"}), [], 0, ""),
    "no tokenizer": (
        lambda m, f: recipe(without(m.base, f, "*token*"), m.tuned[0], tokenizer={"source": "base"}),
        [],
        1,
        "tokenizer",
    ),
    "no template": (
        lambda m, f: recipe(m.base, m.tuned[0], tokenizer={"source": "base"}, chat_template="chat-ml"),
        [],
        1,
        "chat_template",
    ),
    "a template": (
        lambda m, f: recipe(m.base, m.tuned[0], tokenizer={"source": "base"}, chat_template="chatml"),
        [],
        0,
        "",
    ),
    "slices": (lambda m, f: sliced(m, 3), [], 0, ""),
    "slices beyond the end": (lambda m, f: sliced(m, 4), [], 1, "layer_range"),
    "too few": (lambda m, f: model_stock(m.base, m.tuned[0]), [], 1, "at least 2"),
    "enough": (lambda m, f: model_stock(m.base, *m.tuned), [], 0, ""),
    "a gradient where one value belongs": (
        lambda m, f: recipe(m.base, *m.tuned, merge_method="sfgs", parameters={"threshold": [0.1, 0.3]}),
        [],
        1,
        "threshold",
    ),
    "a score for one": (
        lambda m, f: {
            "merge_method": "sfgs",
            "base_model": str(m.base),
            "models": [{"model": str(m.tuned[0]), "parameters": {"score": 1}}, {"model": str(m.tuned[1])}],
        },
        [],
        1,
        "score",
    ),
    "layers as a text": (
        lambda m, f: recipe(m.base, edit_config(changed(m, f), num_hidden_layers="3")),
        [],
        1,
        "num_hidden_layers",
    ),
    "a taken folder": (lambda m, f: recipe(m.base, m.tuned[0]), ["taken"], 1, "not empty"),
    "a taken folder, replaced": (lambda m, f: recipe(m.base, m.tuned[0]), ["taken", "--overwrite"], 0, ""),
    "what another merge has left": (lambda m, f: recipe(m.base, m.tuned[0]), ["left"], 1, "--resume"),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_and_merge_end_alike(tmp_path, family, case):
    make, options, status, said = CASES[case]
    config = make(family("qwen3-tied", "bf16"), tmp_path)
    file, out = tmp_path / "recipe.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    flags = [option for option in options if option.startswith("--")]
    if "taken" in options:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    if "left" in options:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "monosoup_journal.jsonl").write_text("{}\n")
    plan = CliRunner().invoke(main, ["plan", str(file), "--out", str(out), *flags])
    if "cache" in options:
        flags += ["--lora-merge-cache", str(tmp_path / "cache")]
    forget_loaders()
    merge = CliRunner().invoke(main, ["merge", str(file), str(out), *flags])
    forget_loaders()
    for result in (plan, merge):
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (plan.exit_code, merge.exit_code) == (status, status), f"{plan.output}\n{merge.output}"
    assert said in plan.output
    if status:
        assert said in merge.output
        assert sum(line.startswith("error:") for line in plan.output.splitlines()) == 1, plan.output


def test_the_folder_of_an_input_is_not_written_to(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    tuned = copy_with_tensors(models.tuned[0], tmp_path / "tuned", load_tensors(models.tuned[0]))
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(models.base, tuned)))
    for command in (["plan", file, "--out", tuned], ["merge", file, tuned]):
        result = CliRunner().invoke(main, [*map(str, command), "--overwrite"])
        assert result.exit_code == 1
        assert "is the folder of the input" in result.output
    assert (tuned / "model.safetensors").is_file()


def test_an_adapter_is_read_from_its_header(tmp_path, family):
    """Only what it touches is to be edited, and neither torch nor peft is needed to know."""
    base = family("qwen3-tied", "bf16").base
    adapter = write_adapter(tmp_path / "adapter", base)
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(base, f"{base}+{adapter}")))
    found = json.loads(CliRunner().invoke(main, ["plan", str(file), "--json"]).output)
    touched = {t["tensor"] for t in found["tensors"] if t["action"] == "edited"}
    held = load_tensors(base)
    assert touched == {n for n in held if any(part in n for part in ("q_proj", "v_proj", "down_proj"))}
    assert all(t["why"] == "no adapter touches it" for t in found["tensors"] if t["tensor"] == EMBEDDING)
