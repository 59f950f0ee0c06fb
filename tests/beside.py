"""Checkpoints with files beside their weights, and our merge command on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click.testing
import torch
import transformers
from checkpoints import VOCABULARY, build_model, build_tokenizer, fine_tune, write_checkpoint
from commands import forget_loaders, write_config

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "the tin"}]
# Leaves a trace where it is run or merely imported.
CODE = "import pathlib\n\npathlib.Path(__file__).with_name('code-ran').write_text('')\n"


def our_command(*arguments: str | Path) -> click.testing.Result:
    """Run `mergekit-monosoup` in this process."""
    from mergekit_monosoup.cli import main

    forget_loaders()
    try:
        return click.testing.CliRunner().invoke(main, [str(a) for a in arguments])
    finally:
        forget_loaders()


def our_merge(folder: Path, config: Mapping[str, Any], *options: str) -> Path:
    """Merge by `mergekit-monosoup merge` into `folder`/out; the folder of the result."""
    arguments = (write_config(folder, dict(config)), folder / "out", "--quiet", *options)
    result = our_command("merge", *arguments)
    assert result.exit_code == 0, result.output
    return folder / "out"


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    """Write text files into a folder and its sub-folders."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text("utf-8"))


def write_pair(folder: Path, architecture: str = "qwen3-tied", **changes: object) -> tuple[Path, Path]:
    """A base without a chat template, and a chat model of it with sampling defaults of its own."""
    model = build_model(architecture, **changes)
    base = write_checkpoint(folder / "base", model, torch.bfloat16)
    words = build_tokenizer()
    words.chat_template = TEMPLATE
    tuned = write_checkpoint(folder / "tuned", fine_tune(model, seed=1), torch.bfloat16, tokenizer=words)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 3]}
    write_files(tuned, {"generation_config.json": json.dumps(settings, indent=4)})
    return base, tuned


def write_embedder(folder: Path) -> tuple[Path, Path]:
    """A sentence-transformers model with a dense layer of its own, and a fine-tuned copy."""
    from sentence_transformers import SentenceTransformer, models

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = transformers.BertModel(config).eval()
        dense = models.Dense(32, 24)
    folders = []
    for name, parts in (
        ("base", (encoder, dense)),
        ("tuned", (fine_tune(encoder, 1, 0.05), fine_tune(dense, 2, 0.05))),
    ):
        plain = folder / f"{name}-encoder"
        parts[0].save_pretrained(plain)
        build_tokenizer().save_pretrained(plain)
        pooling = models.Pooling(32, pooling_mode="cls")
        modules = [models.Transformer(str(plain)), pooling, parts[1], models.Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder / name))
        shutil.rmtree(plain)
        folders.append(folder / name)
    return folders[0], folders[1]


def write_vision_pair(folder: Path) -> tuple[Path, Path]:
    """A small LLaVA with its processor, and a fine-tuned copy whose processor crops otherwise."""
    words = build_tokenizer(extra=("<image>",))
    text = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    image = words.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=image)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, one, size in (("base", model, 32), ("tuned", fine_tune(model, 1), 16)):
        one.save_pretrained(folder / name)
        transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
            tokenizer=words,
            patch_size=8,
            vision_feature_select_strategy="default",
            chat_template=TEMPLATE if name == "tuned" else None,
        ).save_pretrained(folder / name)
    return folder / "base", folder / "tuned"
