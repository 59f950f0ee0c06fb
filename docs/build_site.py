"""Hooks of mkdocs: pages written from the code, links that leave docs/, and the version on each page.

What the pages link to outside docs/ (examples, results, notebooks) goes into the site: Markdown as a page,
a folder as one page of its files, everything else as the file itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_PAGES = ("benchmarks/robustness/RESULTS.md", "benchmarks/robustness/DESIGN.md", "benchmarks/RESULTS.md")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)]*)?(\))")
_LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?https?:[^"' >]*|<link[^>]*stylesheet[^>]*https?:[^"' >]*"""
)
# What material would load from there to search pages that are opened as files.
_SHIM = "https://unpkg.com/iframe-worker/shim"
_LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".py": "python", ".sh": "sh", ".sbatch": "sh"}


def on_config(config: Any) -> Any:
    """Name the version in the footer of each page."""
    import mergekit_monosoup

    config.copyright = f"Documentation of mergekit-monosoup {mergekit_monosoup.__version__}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference, and what lies outside docs/ and is linked to."""
    for uri, text in _reference().items():
        files.append(File.generated(config, uri, content=text))
    queue = [(f.src_uri, f.content_string) for f in files if f.src_uri.endswith(".md")]
    for name in _PAGES:
        content = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, name, content=content))
        queue.append((name, content))
    for uri, text in queue:
        for _, target, _, _ in _LINK.findall(text):
            path = _outside(uri, target)
            if path is not None and files.get_file_from_path(_uri(path)) is None:
                files.append(_copied(config, path))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ to what the site holds of it."""

    def moved(match: re.Match[str]) -> str:
        head, target, anchor, tail = match.groups()
        here = page.file.src_uri
        path = _outside(here, target)
        if path is None:
            return match[0]
        return f"{head}{os.path.relpath(_uri(path), PurePosixPath(here).parent)}{anchor or ''}{tail}"

    return _LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Take the script for search without a server from the site; refuse a page that loads anything else."""
    own = os.path.relpath("assets/iframe-worker.js", PurePosixPath(page.file.dest_uri).parent)
    output = output.replace(_SHIM, own)
    loaded = _LOADED.search(output)
    if loaded is not None:
        raise PluginError(f"{page.file.src_uri} loads from the network: {loaded[0]}")
    return output


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """Do the same for the page of a web server that finds nothing, which may be called by any path."""
    return output.replace(_SHIM, "/assets/iframe-worker.js") if template_name == "404.html" else output


def _outside(uri: str, target: str) -> str | None:
    """The file or folder of the repository that a link leads to; None for pages of docs/ and the web."""
    if re.match(r"[a-z]+:", target):
        return None
    home = ROOT if (ROOT / uri).exists() else ROOT / "docs"
    path = Path(os.path.normpath(home / PurePosixPath(uri).parent / target))
    if not path.exists() or not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs"):
        return None
    return path.relative_to(ROOT).as_posix()


def _uri(path: str) -> str:
    return f"{path}/files.md" if (ROOT / path).is_dir() else path


def _copied(config: Any, path: str) -> File:
    source = ROOT / path
    if source.is_dir():
        text = f"# {path}\n"
        for file in sorted(p for p in source.iterdir() if p.suffix in _LANGUAGES):
            text += f"\n## {file.name}\n\n````{_LANGUAGES[file.suffix]}\n{file.read_text('utf-8')}````\n"
        return File.generated(config, _uri(path), content=text)
    return File.generated(config, path, abs_src_path=str(source))


def _reference() -> dict[str, str]:
    # By its path: hooks are no package, and docs/ is not on the search path.
    path = Path(__file__).with_name("build_reference.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, str] = module.pages()
    return pages
