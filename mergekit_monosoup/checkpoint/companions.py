"""The files of a model beside its weights: which belong to it, and which are left behind."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LARGEST = 64 << 20


@dataclass(frozen=True)
class Kind:
    """Files that go together: what they are, their names, where they come from or why they stay behind."""

    what: str
    patterns: tuple[str, ...]
    why: str


# In this order: the first kind that matches says what becomes of a file.
LEFT_BEHIND = (
    Kind(
        "weights and their index",
        (
            "model.safetensors",
            "model-*-of-*.safetensors",
            "*.safetensors.index.json",
            "pytorch_model*.bin",
            "pytorch_model.bin.index.json",
        ),
        "written anew",
    ),
    Kind(
        "weights in other formats",
        (
            "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5",
            "*.msgpack", "*.tflite", "*.mlmodel", "*.npz", "*.tar", "*.ot", "model.ckpt*",
            "*/pytorch_model.bin", "adapter_model.*", "adapter_config.json", "onnx/*", "openvino/*",
            "coreml/*",
            "gguf/*", "*.mlpackage/*", "original/*",
        ),
        "they are of the model before the edit",
    ),
    Kind(
        "training state",
        (
            "optimizer*", "scheduler*", "scaler.pt", "trainer_state.json", "rng_state*", "training_args.bin",
            "global_step*/*", "checkpoint-*/*", "runs/*", "wandb/*", "logs/*", "latest", "zero_to_fp32.py",
            "events.out.tfevents*", "all_results.json", "train_results.json", "eval_results.json",
            "trainer_log.jsonl",
        ),
        "it goes on with another model",
    ),
    Kind("model card", ("README.md",), "the card is that of the merge; licence and language carry over"),
    Kind(
        "records of an earlier merge",
        ("mergekit_config.yml", "monosoup_report.jsonl", "monosoup_figures/*", "monosoup_edit.json",
         "monosoup.lock", "monosoup_journal.jsonl"),
        "written anew",
    ),
    Kind(
        "of the repository, caches",
        (".git/*", ".gitattributes", ".gitignore", ".cache/*", "*__pycache__/*", "*.pyc", ".DS_Store",
         "*.lock", "*.tmp"),
        "not of the model",
    ),
)  # fmt: skip
TOKENIZER = Kind(
    "tokenizer",
    (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "*.tiktoken", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*",
    ),
    "the fine-tuned checkpoint; the recipe where it has `tokenizer:` or `chat_template:`",
)  # fmt: skip
TAKEN = (
    Kind(
        "configuration",
        ("config.json",),
        "the fine-tuned checkpoint, put right where the written weights differ",
    ),
    TOKENIZER,
    Kind("generation settings", ("generation_config.json",), "the fine-tuned checkpoint, byte for byte"),
    Kind(
        "processors",
        ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        "the fine-tuned checkpoint, byte for byte",
    ),
    Kind("code that `auto_map` names", ("*.py",), "the fine-tuned checkpoint; copied, never run"),
    Kind(
        "modules of sentence-transformers",
        ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/*"),
        "the fine-tuned checkpoint; modules with weights of their own are merged",
    ),
)
OTHER = Kind("any other file up to 64 MB", ("*",), "the fine-tuned checkpoint, byte for byte")


@dataclass(frozen=True)
class Companions:
    """The files of one folder: those that go with the model, and those that do not, with the reason."""

    taken: tuple[str, ...]
    left: dict[str, str]


def kind_of(name: str) -> tuple[Kind, bool]:
    """Return of which kind a file is, by its path in the model's folder, and whether it is taken."""
    for kind in LEFT_BEHIND:
        if _matches(name, kind):
            return kind, False
    for kind in TAKEN:
        if _matches(name, kind):
            return kind, True
    return OTHER, True


def is_tokenizer(name: str) -> bool:
    """Say whether a file belongs to the tokenizer or to its chat template."""
    return _matches(name, TOKENIZER)


def _matches(name: str, kind: Kind) -> bool:
    path = PurePosixPath(name)
    plain = name.lower(), path.name.lower()
    return any(
        # A pattern with a folder speaks of whole paths, one without of names at any depth.
        fnmatch.fnmatchcase(plain[0] if "/" in pattern else plain[1], pattern.lower())
        or ("/" in pattern and fnmatch.fnmatchcase(plain[0], f"*/{pattern.lower()}"))
        for pattern in kind.patterns
    )


def companions(folder: Path) -> Companions:
    """Sort the files of a local model.

    Links that lead out of the folder are not followed, but for those of the Hub's cache to its own blobs.
    """
    taken: list[str] = []
    left: dict[str, str] = {}
    for name in _files(folder):
        kind, wanted = kind_of(name)
        if not wanted:
            left[name] = f"{kind.what}: {kind.why}"
        elif not _inside(folder, folder / name):
            left[name] = "a link out of the folder"
        elif (folder / name).stat().st_size > LARGEST:
            left[name] = "larger than 64 MB"
        else:
            taken.append(name)
    return Companions(tuple(taken), left)


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _inside(folder: Path, path: Path) -> bool:
    root, target = folder.resolve(), path.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(cache)


def wanted_of(names: Iterable[str]) -> list[str]:
    """Return which files of a repository are to be asked for."""
    return [name for name in names if kind_of(name)[1]]


def weight_folders(folder: Path) -> list[str]:
    """Return the sub-folders whose weights belong to the model: modules of sentence-transformers.

    Their weights are `model.safetensors` or `pytorch_model.bin` in a folder that modules.json names.
    """
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text("utf-8")) if file.is_file() else []
    except ValueError:
        modules = []
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    found = []
    for path in paths:
        inner = folder / str(path or "")
        if path and _inside(folder, inner) and weights_in(inner) is not None:
            found.append(PurePosixPath(str(path)).as_posix())
    return found


def weights_in(folder: Path) -> Path | None:
    """Return the file of weights of a module, None where it has none."""
    files = (folder / "model.safetensors", folder / "pytorch_model.bin")
    return next((file for file in files if file.is_file()), None)


def difference(base: Path, finetuned: Path) -> str | None:
    """Return in words in which files a fine-tuned checkpoint differs from its base, None where in none."""
    ours, theirs = (set(companions(folder).taken) - {"config.json"} for folder in (finetuned, base))
    changed = [
        name for name in sorted(ours) if name not in theirs or not _same(base / name, finetuned / name)
    ]
    if not changed:
        return None
    listed = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    return f"its own {listed}"


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
