"""The files of a model beside its weights: which belong to it, and which are left behind."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

LARGEST = 64 << 20
"""Bytes up to which a file of no known kind belongs to a model."""


@dataclass(frozen=True)
class Kind:
    """Files that go together: what they are, their names, and where they come from or why they stay behind.

    Args:
        what: in the words of the documentation.
        patterns: names of files at any depth; with a slash at its end, of folders at any depth.
        why: where taken files come from, or why others are left behind.
        small: whether the kind ends at `LARGEST`.
    """

    what: str
    patterns: tuple[str, ...]
    why: str
    small: bool = False


WEIGHTS = Kind(
    "weights and their index",
    ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json"),
    "merged and written anew; in sub-folders those of modules that `modules.json` names",
)
# In this order: the first kind that matches says what becomes of a file.
LEFT_BEHIND = (
    Kind(
        "training state and logs",
        (
            "checkpoint-*/", "global_step*/", "runs/", "wandb/", "logs/", "mlruns/", "pytorch_model_fsdp*/",
            "optimizer_*/", "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin", "scaler.pt",
            "trainer_state.json", "training_args.*", "rng_state*", "random_states_*", "latest", "latest_step",
            "zero_to_fp32.py", "*.distcp", "events.out.tfevents*", "*_results.json", "trainer_log.jsonl",
            "train.log",
        ),
        "of the training, which goes on with another model",
    ),
    WEIGHTS,
    Kind(
        "adapters",
        ("adapter_model*", "adapter_config.json"),
        "merged; beside whole weights they would be applied a second time",
    ),
    Kind(
        "weights in other formats",
        (
            "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt*", "*.gguf", "*.ggml", "*.onnx",
            "*.onnx_data*", "*.onnx.data", "*.h5", "*.msgpack", "*.ot", "*.pb", "*.npz",
            "*.tflite", "*.litertlm", "*.mlmodel",
            "*.nemo", "*.engine", "*.pte", "onnx/", "openvino/", "coreml/", "gguf/", "*.mlpackage/",
            "*.mlmodelc/", "original/",
        ),
        "of the model before the edit",
    ),
    Kind(
        "settings of a quantisation",
        ("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
        "the merged weights are not quantised",
    ),
    Kind(
        "model card",
        ("README.md",),
        "the card is that of the merge; licence and languages carry over",
    ),
    Kind(
        "records of an earlier merge",
        ("mergekit_config.y*ml", "mergekit_moe_config.y*ml", "monosoup_*", "monosoup_figures/",
         "monosoup.lock"),
        "written anew",
    ),
    Kind(
        "version control, caches, hidden files",
        (".*", ".*/", "__pycache__/", "*.pyc", "*.lock", "*.tmp", "*.incomplete", "*.swp", "*~"),
        "not of the model",
    ),
)  # fmt: skip
CONFIGURATION = Kind(
    "configuration",
    ("config.json",),
    "the fine-tuned checkpoint, put right where the written weights differ",
)
TOKENIZER = Kind(
    "tokenizer and chat templates",
    (
        "tokenizer*.json", "tokenizer*.model*", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model",
        "*.tiktoken", "tekken.json", "chat_template*.json", "chat_template*.jinja",
        "additional_chat_templates/",
    ),
    "the fine-tuned checkpoint, byte for byte (an adapter's own go before its base's, and the base's where "
    "there are none); the recipe where it has `tokenizer:` or `chat_template:`",
)  # fmt: skip
GENERATION = Kind(
    "generation settings",
    ("generation_config.json",),
    "the fine-tuned checkpoint, byte for byte; token ids put right where the recipe has a `tokenizer:`",
)
TAKEN = (
    TOKENIZER,
    GENERATION,
    Kind(
        "processors",
        ("*preprocessor_config.json", "processor_config.json", "feature_extractor_config.json"),
        "the fine-tuned checkpoint, byte for byte",
    ),
    Kind("custom code (`auto_map`)", ("*.py",), "the fine-tuned checkpoint; copied, never run"),
    Kind(
        "modules of sentence-transformers",
        ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/"),
        "the fine-tuned checkpoint, with their folders; weights of a module are merged like the rest",
    ),
)
OTHER = Kind("any other file up to 64 MB", ("*",), "the fine-tuned checkpoint, byte for byte", small=True)


@dataclass(frozen=True)
class Companions:
    """The files of one folder: those that go with the model, and those that do not, with the reason."""

    taken: tuple[str, ...]
    left: Mapping[str, str]
    unusual: tuple[str, ...] = ()
    """Those left behind although nobody would expect it."""


def kind_of(name: str) -> tuple[Kind, bool]:
    """Return of which kind a file is, by its path in the model's folder, and whether it is taken."""
    if name == "config.json":
        return CONFIGURATION, True
    for kind in LEFT_BEHIND:
        if _matches(name, kind):
            return kind, False
    return next((kind for kind in TAKEN if _matches(name, kind)), OTHER), True


def is_tokenizer(name: str) -> bool:
    """Say whether a file belongs to the tokenizer or to its chat template."""
    return kind_of(name)[0] is TOKENIZER


def is_taken(name: str, size: int | None = None) -> bool:
    """Say whether a file of a model goes with it, by path and size in bytes."""
    kind, taken = kind_of(name)
    return taken and not (kind.small and size is not None and size > LARGEST)


def _matches(name: str, kind: Kind) -> bool:
    *folders, file = PurePosixPath(name.lower()).parts
    for pattern in kind.patterns:
        if pattern.endswith("/"):
            if any(fnmatch.fnmatchcase(folder, pattern[:-1].lower()) for folder in folders):
                return True
        elif fnmatch.fnmatchcase(file, pattern.lower()):
            return True
    return False


def patterns_left_behind() -> list[str]:
    """Return glob patterns of what is left behind, in the form in which the Hub's client takes them."""
    found = []
    for pattern in (pattern for kind in LEFT_BEHIND for pattern in kind.patterns):
        plain = f"{pattern}*" if pattern.endswith("/") else pattern
        found += [plain, f"*/{plain}"]
    return found


def companions(folder: Path) -> Companions:
    """Sort the files of a local model.

    Links that lead out of the folder are not followed, but for those of the Hub's cache to its own blobs.
    """
    taken: list[str] = []
    left: dict[str, str] = {}
    unusual: list[str] = []
    modules = module_folders(folder)
    for name in _files(folder):
        path = folder / name
        kind, wanted = kind_of(name)
        if not wanted:
            left[name] = f"{kind.what}: {kind.why}"
            parent = PurePosixPath(name).parent.as_posix()
            if kind is WEIGHTS and parent != "." and not _within(parent, modules):
                left[name] = "weights of a sub-folder that modules.json does not name are not merged"
                unusual.append(name)
        elif not _inside(folder, path):
            left[name] = "a link out of the folder"
            unusual.append(name)
        elif path.is_dir():
            left[name] = "a link to a folder"
            unusual.append(name)
        elif not is_taken(name, path.stat().st_size):
            left[name] = f"larger than {LARGEST >> 20} MB"
            unusual.append(name)
        else:
            taken.append(name)
    return Companions(tuple(taken), left, tuple(unusual))


def _files(folder: Path) -> Iterator[str]:
    """Yield files and links to folders, by their paths in the folder; links are not gone into."""
    for where, folders, files in os.walk(folder):
        # Thousands of files may lie in there, and none is of the model.
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        linked = [f for f in folders if (Path(where) / f).is_symlink()]
        for name in sorted([*files, *linked]):
            path = Path(where) / name
            if path.is_file() or name in linked:
                yield path.relative_to(folder).as_posix()


def _inside(folder: Path, path: Path) -> bool:
    root, target = folder.resolve(), path.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(cache)


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(folder) for folder in folders)


def module_folders(folder: Path) -> list[str]:
    """Return the sub-folders that sentence-transformers' modules.json names; none where there is no such."""
    file = folder / "modules.json"
    try:
        return modules_in(json.loads(file.read_text("utf-8"))) if file.is_file() else []
    except (OSError, ValueError):
        return []


def modules_in(modules: Any) -> list[str]:
    """Return the sub-folders that the content of a modules.json names."""
    entries = modules if isinstance(modules, list) else []
    paths = [PurePosixPath(str(e["path"])) for e in entries if isinstance(e, dict) and e.get("path")]
    return [p.as_posix() for p in paths if not p.is_absolute() and ".." not in p.parts and p.parts]


def weight_folders(folder: Path) -> list[str]:
    """Return the sub-folders whose weights belong to the model: modules of sentence-transformers.

    Their weights are `model.safetensors` or `pytorch_model.bin` in a folder that modules.json names, or below
    it (routers hold modules of their own).
    """
    found = []
    for name in dict.fromkeys(module_folders(folder)):
        if not (folder / name).is_dir() or not _inside(folder, folder / name):
            continue
        for where, _, _ in os.walk(folder / name):
            if weights_in(Path(where)) is not None:
                found.append(Path(where).relative_to(folder).as_posix())
    return sorted(found)


def weights_in(folder: Path) -> Path | None:
    """Return the file of weights of a module, None where it has none."""
    files = (folder / "model.safetensors", folder / "pytorch_model.bin")
    return next((file for file in files if file.is_file()), None)


# Written by every save, and of no consequence.
_INCIDENTAL = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "_from_model_config", "dtype", "torch_dtype",
    "use_cache", "_attn_implementation", "attn_implementation", "is_local", "local_files_only",
})  # fmt: skip


def difference(base: Path, finetuned: Path) -> str | None:
    """Return in which files a fine-tuned checkpoint differs from its base, None where in none that counts.

    Only names that a merge would take are looked at, of known kinds (of an adapter those of its tokenizer);
    JSON is compared by its content.
    """
    taken = companions(finetuned).taken
    whole = "config.json" in taken or not (finetuned / "adapter_config.json").is_file()
    kinds = [CONFIGURATION, *TAKEN] if whole else [TOKENIZER]
    changed = [
        name for name in taken if kind_of(name)[0] in kinds and not _same(name, base / name, finetuned / name)
    ]
    # What the base alone has comes along as well, such as a template that the fine-tuned model does without.
    changed += [
        f"no {name}"
        for name in companions(base).taken
        if whole and kind_of(name)[0] in (TOKENIZER, GENERATION) and not (finetuned / name).exists()
        if any(is_tokenizer(own) for own in taken)
    ]
    if not changed:
        return None
    listed = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    return listed if changed[0].startswith("no ") else f"its own {listed}"


def _same(name: str, one: Path, other: Path) -> bool:
    if not one.is_file():
        return False
    a, b = one.read_bytes(), other.read_bytes()
    if a == b or not name.endswith(".json"):
        return a == b
    try:
        return bool(_essential(json.loads(a)) == _essential(json.loads(b)))
    except ValueError:
        return False


def _essential(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _essential(value) for key, value in content.items() if key not in _INCIDENTAL}
    return content
