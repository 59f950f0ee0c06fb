"""The text of the language track: what Python and the study's packages bring along, in five domains.

Nothing is downloaded. Documents go to training, validation or test by a hash of their name; a paragraph
that has occurred before, in this order of the splits, is left out.
"""

from __future__ import annotations

import gzip
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath

from .sources import Document, docstrings, installed_files, is_prose, located, source_files, strip_docstrings

SPLITS = ("train", "validation", "test")
# One document ends, another begins. The byte occurs in no text and is the models' end-of-text token.
END_OF_DOCUMENT = b"\0"
# Without this much a domain can be neither learnt nor measured.
SMALLEST = {"train": 100_000, "validation": 12_500, "test": 24_000}

# Distributions whose docstrings are read, and how much of their source, in a fixed random order of the files.
DOCUMENTED = {"numpy": 1_000_000, "scipy": 2_000_000, "scikit-learn": 2_000_000, "torch": 1_000_000}
PYTHON_BYTES = 3_000_000
HEADER_BYTES = 1_000_000
LICENCE_NAME = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
# Debian and its relatives keep the common licences here; elsewhere the distributions' own suffice.
COMMON_LICENCES = Path("/usr/share/common-licenses")
# Those of the UCI Machine Learning Repository, whose terms are known (CC BY 4.0).
TABLES = ("breast_cancer.csv", "digits.csv.gz", "iris.csv", "wine_data.csv")
ROWS = 16


class CorpusError(RuntimeError):
    """This machine does not have enough text of a domain."""


@dataclass(frozen=True)
class Corpus:
    """The three splits of one domain, and the names and versions of what they come from."""

    domain: str
    sources: tuple[str, ...]
    splits: dict[str, bytes]

    def card(self) -> dict[str, object]:
        """Return the sources, and the size and SHA-256 of every split."""
        return {
            "sources": list(self.sources),
            "splits": {
                name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
                for name, text in self.splits.items()
            },
        }


@cache
def corpus(domain: str) -> Corpus:
    """Return a domain's text; raise CorpusError if this machine has too little of it."""
    try:
        documents, sources = _READERS[domain]()
    except (metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        raise CorpusError(f"domain {domain!r}: {error.name} is not installed; {_REMEDIES[domain]}") from error
    splits = _split(documents)
    for name, least in SMALLEST.items():
        if len(splits[name]) < least:
            raise CorpusError(
                f"domain {domain!r}: {len(splits[name])} bytes of {name} text, {least} are needed; "
                f"the text comes from {', '.join(sources)}: {_REMEDIES[domain]}"
            )
    return Corpus(domain, sources, splits)


def split_of(name: str) -> str:
    """Return the split of a document: a tenth each for validation and test, by the name's SHA-256."""
    share = hashlib.sha256(name.encode()).digest()[0] / 256
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def paragraphs(text: str) -> Iterator[str]:
    """Yield what stands between blank lines, without empty pieces."""
    return (part.strip("\n") for part in re.split(r"\n[ \t]*(?:\n[ \t]*)+", text) if part.strip())


def normalised(paragraph: str) -> str:
    """Return what two paragraphs have in common that differ in case, digits or spaces alone."""
    return re.sub(r"[\W\d_]+", " ", paragraph).strip().casefold()


def _split(documents: Iterable[Document]) -> dict[str, bytes]:
    by_split: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in sorted(documents, key=lambda document: document.name):
        by_split[split_of(document.name)].append(document)
    seen: set[str] = set()
    result = {}
    for name in SPLITS:
        texts = []
        # By hash: neighbours in the text are then not the alphabet's neighbours.
        for document in sorted(by_split[name], key=lambda document: _digest(document.name)):
            kept = []
            for paragraph in paragraphs(document.text.replace("\0", "")):
                # Tables are nothing but digits: they are told apart as they stand.
                key = normalised(paragraph) or paragraph
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
            if kept:
                texts.append("\n\n".join(kept).encode())
        result[name] = END_OF_DOCUMENT.join(texts)
    return result


def _digest(name: str) -> bytes:
    return hashlib.sha256(b"order:" + name.encode()).digest()


def _version(distribution: str) -> str:
    return f"{distribution} {metadata.version(distribution)}"


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _prose() -> tuple[list[Document], tuple[str, ...]]:
    from pydoc_data.topics import topics

    documents = [
        Document(f"topics/{name}", "\n\n".join(filter(is_prose, map(_unwrapped, paragraphs(text)))))
        for name, text in topics.items()
    ]
    for name, limit in {"stdlib": PYTHON_BYTES, **DOCUMENTED}.items():
        for document in source_files(name, ".py", limit, _digest):
            found = (part for text in docstrings(document.text) for part in paragraphs(text))
            documents.append(Document(document.name, "\n\n".join(filter(is_prose, map(_unwrapped, found)))))
    return documents, (_python(), *(_version(name) for name in DOCUMENTED))


def _unwrapped(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _python_code() -> tuple[list[Document], tuple[str, ...]]:
    files = source_files("stdlib", ".py", PYTHON_BYTES, _digest)
    return [Document(file.name, strip_docstrings(file.text)) for file in files], (_python(),)


def _headers() -> tuple[list[Document], tuple[str, ...]]:
    documents = list(source_files("torch", ".h", HEADER_BYTES, _digest, within="torch/include/c10/"))
    documents += source_files("torch", ".h", HEADER_BYTES, _digest, within="torch/include/torch/csrc/")
    include = Path(sysconfig.get_path("include"))
    for file in sorted(include.rglob("*.h")):
        text = file.read_text(encoding="utf-8", errors="replace")
        documents.append(Document(f"include/{file.relative_to(include).as_posix()}", text))
    return documents, (_version("torch"), *([_python()] if include.is_dir() else []))


def _licences() -> tuple[list[Document], tuple[str, ...]]:
    documents, sources = [], []
    for name in sorted({found.name for found in metadata.distributions() if found.name}):
        for file in installed_files(name):
            if not LICENCE_NAME.search(PurePosixPath(file).name) or file.endswith((".py", ".pyc")):
                continue
            path = located(name, file)
            if path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                documents.append(Document(f"{name}/{file}", text))
                sources.append(_version(name))
    if COMMON_LICENCES.is_dir():
        files = sorted(COMMON_LICENCES.iterdir())
        documents += [Document(f"common/{file.name}", file.read_text(encoding="utf-8")) for file in files]
        sources.append("the operating system's common-licenses")
    return documents, tuple(dict.fromkeys(sources))


def _tables() -> tuple[list[Document], tuple[str, ...]]:
    documents = []
    for name in installed_files("scikit-learn"):
        if PurePosixPath(name).name not in TABLES:
            continue
        raw = located("scikit-learn", name).read_bytes()
        lines = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().splitlines()
        # A file is one table: its rows are shared out in sections.
        documents += [
            Document(f"{name}:{start}", "\n".join(lines[start : start + ROWS]))
            for start in range(0, len(lines), ROWS)
        ]
    return documents, (_version("scikit-learn"),)


_READERS = {
    "prose": _prose,
    "python": _python_code,
    "headers": _headers,
    "licences": _licences,
    "tables": _tables,
}
_REMEDIES = {
    "prose": "install a Python with pydoc_data and packages with docstrings (not stripped by -OO)",
    "python": "install a Python whose standard library comes as source files",
    "headers": "install the wheel of torch, which brings its headers, or Python's development files",
    "licences": "install this package with its extras `test` or `dev`, whose packages bring their licences",
    "tables": "install scikit-learn from its wheel, which brings its data sets",
}
