"""The tokenizer of a result: whose files, which chat template, which ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mergekit.tokenizer import TokenizerInfo

from mergekit_monosoup.checkpoint.companions import companions, is_tokenizer
from mergekit_monosoup.merging.configuration import renumbered, write_config

LOG = logging.getLogger(__name__)

GENERATION = "generation_config.json"
# Tokenizer files that say nothing without the vocabulary that another one holds.
_ABOUT_TOKENIZERS = ("tokenizer_config", "special_tokens_map", "added_tokens", "chat_template", "additional_")


def tokenizer_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the files of a tokenizer by their names.

    Args:
        folders: gone through until one has a vocabulary; earlier ones count first.
    """
    taken: dict[str, Path] = {}
    for folder in folders:
        own = {name: folder / name for name in companions(folder).taken if is_tokenizer(name)}
        taken = own | taken
        if any(map(has_vocabulary, own)):
            break
    return taken


def has_vocabulary(name: str) -> bool:
    """Say whether a file holds the tokens of a tokenizer."""
    return is_tokenizer(name) and not PurePosixPath(name).name.startswith(_ABOUT_TOKENIZERS)


def set_chat_template(folder: Path, template: str) -> None:
    """Give a folder's tokenizer a chat template: where it has one, else in a file of its own."""
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    (folder / "chat_template.json").unlink(missing_ok=True)
    if "chat_template" in content:
        content["chat_template"] = template
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if "chat_template" not in content or (folder / "chat_template.jinja").is_file():
        (folder / "chat_template.jinja").write_text(template, "utf-8")


def chat_template_in(folder: Path) -> str | None:
    """Return the chat template of a folder's tokenizer, None where it has none or several."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text("utf-8")
    found = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def renumber(out: Path, before: Path, tokenizer: TokenizerInfo) -> None:
    """Put right the ids of special tokens where a result's vocabulary has others than its checkpoint's.

    Args:
        out: folder of the result.
        before: tokenizer.json of the checkpoint that its other files come from.
        tokenizer: of the result.
    """
    from tokenizers import Tokenizer

    if not before.is_file():
        LOG.warning(
            "the token ids in config.json and %s are those of the checkpoint; compare them with the "
            "tokenizer that the recipe asks for: there is no %s to do it by",
            GENERATION,
            before,
        )
        return
    new = tokenizer.tokenizer.get_vocab()
    ids = {index: new.get(token) for token, index in Tokenizer.from_file(str(before)).get_vocab().items()}
    for path in (out / "config.json", out / GENERATION):
        if path.is_file():
            content = json.loads(path.read_text("utf-8"))
            changed = renumbered(content, ids, tokenizer.tokenizer.eos_token_id)
            write_config(path, path.read_bytes(), content, changed)
