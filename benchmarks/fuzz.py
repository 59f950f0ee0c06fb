"""Feed damaged and hostile files to whatever reads files that others wrote; see docs/reliability.md.

    python benchmarks/fuzz.py --count 100000 --seed 0

Real files (a recipe, headers, an index, configurations, an adapter) are changed at random and handed to the
plan and to the readers below it, in this process. Counted are tracebacks (anything but one of the package's
own errors), hangs (more than ten seconds), messages that are no sentence, and the memory that is gained. The
exit status is 0 if there is none.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Names of models that are none of this machine would be looked up.
os.environ["HF_HUB_OFFLINE"] = "1"

from mergekit_monosoup.checkpoint.adapter_folder import read_adapter_folder
from mergekit_monosoup.checkpoint.card import declared_bases
from mergekit_monosoup.checkpoint.headers import read_folder, read_safetensors_header
from mergekit_monosoup.errors import MonoSoupError
from mergekit_monosoup.planning.plan import PlanOptions, make_plan

HANG_SECONDS = 10
MEMORY_BYTES = 1 << 30
_LONG_LINE = 600

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "0", "true", "../x", "/etc/passwd", "C:\\x", "a/b/c", "~", "\x00", "\x1b[31m", "\ud800", "é",
    "x" * 5000, [], [[]], [None], {}, {"a": {}}, [1, "a", None], {"path": 3}, {"model": {"path": []}},
    {"filter": None, "value": []}, [{"filter": "x"}], ["model"], "https://huggingface.co/user/name",
)  # fmt: skip
TOKENS = (
    "&a ", "*a", "!!python/object/apply:os.system ", "!!binary ", "!!timestamp ", "!!int ", "!!float ",
    "!!set ", "!!omap ", "<<: ", "? ", "---\n", "...\n", "|\n", ">\n", "'", '"', "{", "}", "[", "]", ",", ":",
    "- ", "\n", "\t", "\\", "\x00", "\x1b", "\ufeff", "NaN", "-Infinity", "1e999", "9" * 5000, "0x", "1:2:3",
    "2001-99-99",
    "null", "~", "[" * 2000, "{" * 500, "../", "%", "@", "`", "*", "&", "!", "#", " ",
)  # fmt: skip


@dataclass
class Findings:
    """What went wrong, and how often."""

    runs: int = 0
    refused: int = 0
    accepted: int = 0
    hangs: Counter[str] = field(default_factory=Counter)
    tracebacks: Counter[str] = field(default_factory=Counter)
    long_messages: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    def note(self, log: Callable[[str], None], kind: str, example: str) -> None:
        """Keep and show the first example of a kind."""
        if kind not in self.examples:
            self.examples[kind] = example
            log(f"--- {kind}\n{example}")

    @property
    def count(self) -> int:
        """Number of runs that did not end as they should."""
        return sum(self.hangs.values()) + sum(self.tracebacks.values()) + sum(self.long_messages.values())


class Hang(BaseException):
    """A run took too long; no handler of the package may catch it."""


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise `Hang` in the block after some seconds."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Mutator:
    """Change texts and data at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self, text: str) -> str:
        """Return a text with a few characters or lines removed, doubled, moved or put in."""
        for _ in range(self.random.randint(1, 4)):
            place = self.random.randint(0, len(text))
            end = min(len(text), place + self.random.choice((1, 2, 5, 20, 100)))
            kind = self.random.randrange(5)
            if kind == 0:
                text = text[:place] + text[end:]
            elif kind == 1:
                text = text[:place] + self.random.choice(TOKENS) + text[place:]
            elif kind == 2:
                text = text[:place] + text[place:end] * self.random.choice((2, 3, 50)) + text[end:]
            elif kind == 3:
                text = text[:place] + chr(self.random.randrange(0x110)) + text[place + 1 :]
            else:
                text = text[:place]
        return text

    def data(self, value: Any) -> Any:
        """Return data with one to three of its values, keys or entries changed; the original stays."""
        value = json.loads(json.dumps(value))
        for _ in range(self.random.randint(1, 3)):
            value = self._changed(value)
        return value

    def _value(self) -> Any:
        return copy.deepcopy(self.random.choice(VALUES))

    def _changed(self, value: Any) -> Any:
        if self.random.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
            return self._value()
        key: Any = self.random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = self.random.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[str(self._value())] = value.pop(key)
        elif kind == 2 and isinstance(value, list):
            value.append(value[key])
        elif kind == 3:
            value[key] = self._value()
        else:
            value[key] = self._changed(value[key])
        return value


class Files:
    """Real files in a folder, and what reads them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.mutator = Mutator(seed)
        write_models(folder)
        self.recipe = {
            "merge_method": "monosoup",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / "tuned"), "parameters": {"weight": 1.0}}],
            "parameters": {"energy": 0.8, "edit": [{"filter": "mlp", "value": False}, {"value": True}]},
            "dtype": "bfloat16",
            "tokenizer": {"source": "base"},
        }
        layers = [{"model": str(folder / name), "layer_range": [0, 2]} for name in ("base", "tuned")]
        self.sliced = {
            "merge_method": "monosoup", "base_model": str(folder / "base"), "slices": [{"sources": layers}],
        }  # fmt: skip
        self.targets: dict[str, Callable[[], None]] = {
            "recipe, as text": self._recipe_text,
            "recipe, as data": self._recipe_data,
            "header": self._header,
            "header, as bytes": self._header_bytes,
            "index": self._index,
            "config.json": self._config,
            "adapter_config.json": self._adapter_config,
            "adapter header": self._adapter_header,
            "README.md": self._card,
        }

    def _plan(self, recipe: str) -> None:
        found = make_plan(recipe, PlanOptions(costs=False))
        for problem in found.problems.found:
            if len(str(problem)) > _LONG_LINE + 4 * len(str(self.folder)):
                raise LongMessage(str(problem))

    def _plan_with(self, base: str, tuned: str) -> None:
        recipe = {**self.recipe, "base_model": base, "models": [{"model": tuned}]}
        del recipe["tokenizer"]
        self._plan(yaml.safe_dump(recipe))

    def _recipe_text(self) -> None:
        start = self.mutator.random.choice((self.recipe, self.sliced))
        self._plan(self.mutator.text(yaml.safe_dump(start, sort_keys=False)))

    def _recipe_data(self) -> None:
        changed = self.mutator.data(self.mutator.random.choice((self.recipe, self.sliced)))
        self._plan(yaml.safe_dump(changed, sort_keys=False))

    def _changed_copy(self, source: str, file: str, content: bytes) -> Path:
        changed = self.folder / f"changed-{source}"
        if not changed.exists():
            shutil.copytree(self.folder / source, changed)
        (changed / file).write_bytes(content)
        return changed

    def _header(self) -> None:
        raw = (self.folder / "tuned" / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = self.mutator.data(json.loads(raw[8 : 8 + length]))
        self._headed(json.dumps(header).encode("utf-8", "surrogatepass"), raw[8 + length :])

    def _header_bytes(self) -> None:
        raw = (self.folder / "tuned" / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        text = self.mutator.text(raw[8 : 8 + length].decode())
        self._headed(text.encode("utf-8", "surrogatepass"), raw[8 + length :])

    def _headed(self, header: bytes, rest: bytes) -> None:
        length = len(header)
        if self.mutator.random.random() < 0.1:
            length = self.mutator.random.choice((0, 1, length + 1, 10**8, 2**63, 2**64 - 1))
        changed = self._changed_copy("tuned", "model.safetensors", struct.pack("<Q", length) + header + rest)
        read_safetensors_header(changed / "model.safetensors")
        self._plan_with(str(self.folder / "base"), str(changed))

    def _index(self) -> None:
        file = "model.safetensors.index.json"
        content = self._document((self.folder / "sharded" / file).read_text())
        changed = self._changed_copy("sharded", file, content)
        read_folder("sharded", changed)
        self._plan_with(str(self.folder / "base"), str(changed))

    def _config(self) -> None:
        content = self._document((self.folder / "tuned" / "config.json").read_text())
        changed = self._changed_copy("tuned", "config.json", content)
        shutil.copyfile(self.folder / "tuned" / "model.safetensors", changed / "model.safetensors")
        try:
            self._plan_with(str(self.folder / "base"), str(changed))
            self._plan_with(str(changed), str(changed))
        finally:
            shutil.copyfile(self.folder / "tuned" / "config.json", changed / "config.json")

    def _adapter_config(self) -> None:
        content = self._document((self.folder / "adapter" / "adapter_config.json").read_text())
        changed = self._changed_copy("adapter", "adapter_config.json", content)
        self._adapted(changed)

    def _adapter_header(self) -> None:
        file = "adapter_model.safetensors"
        raw = (self.folder / "adapter" / file).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = self._document(raw[8 : 8 + length].decode())
        changed = self._changed_copy(
            "adapter", file, struct.pack("<Q", len(header)) + header + raw[8 + length :]
        )
        config = "adapter_config.json"
        shutil.copyfile(self.folder / "adapter" / config, changed / config)
        self._adapted(changed)

    def _adapted(self, adapter: Path) -> None:
        read_adapter_folder("adapter", adapter)
        base = str(self.folder / "base")
        self._plan_with(base, f"{base}+{adapter}")

    def _card(self) -> None:
        text = "---\nbase_model:\n- user/name\ntags: [a, b]\n---\n# Title\n"
        changed = self._changed_copy(
            "base", "README.md", self.mutator.text(text).encode("utf-8", "surrogatepass")
        )
        declared_bases(changed)

    def _document(self, text: str) -> bytes:
        if self.mutator.random.random() < 0.3:
            return self.mutator.text(text).encode("utf-8", "surrogatepass")
        return json.dumps(self.mutator.data(json.loads(text))).encode("utf-8", "surrogatepass")


class LongMessage(Exception):
    """A finding that is no sentence any more."""


def write_models(folder: Path) -> None:
    """A small base, a variant of it, the variant in shards, and an adapter."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=48, max_position_embeddings=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(folder / "adapter")
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    model.save_pretrained(folder / "sharded", max_shard_size="8KB")


def fuzz(folder: Path, count: int, seed: int, only: str = "", log: Callable[[str], None] = print) -> Findings:
    """Run the targets in turn and return what was found.

    Args:
        folder: for the files.
        count: number of runs.
        seed: of the changes.
        only: part of the names of the targets to run.
        log: takes a line now and then.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    files, findings = Files(folder, seed), Findings()
    targets = [(name, run) for name, run in files.targets.items() if only in name]
    for index in range(count):
        name, run = targets[index % len(targets)]
        begin = time.perf_counter()
        findings.runs += 1
        try:
            with alarm(HANG_SECONDS):
                run()
            findings.accepted += 1
        except MonoSoupError as error:
            findings.refused += 1
            if len(str(error)) > _LONG_LINE + 4 * len(str(folder)):
                findings.long_messages[name] += 1
                findings.note(log, f"{name}: long message", str(error)[:1000])
        except LongMessage as error:
            findings.long_messages[name] += 1
            findings.note(log, f"{name}: long message", str(error)[:1000])
        except Hang:
            findings.hangs[name] += 1
            findings.note(log, f"{name}: hang", traceback.format_exc(limit=-6))
        except Exception as error:  # noqa: BLE001 - counting them is what this is for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{name}: {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
            findings.tracebacks[kind] += 1
            findings.note(log, kind, traceback.format_exc(limit=-8)[-1500:])
        findings.slowest = max(findings.slowest, time.perf_counter() - begin)
        if (index + 1) % 10_000 == 0:
            log(f"{index + 1:,} runs, {findings.count} findings")
    return findings


def peak_bytes() -> int:
    """Largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Parse the command line, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the targets")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzz(Path(folder), 50, options.seed, options.only)
        before = peak_bytes()
        begin = time.perf_counter()
        found = fuzz(Path(folder), options.count, options.seed, options.only)
        seconds = time.perf_counter() - begin
        gained = peak_bytes() - before
    print(
        f"{found.runs:,} runs in {seconds:.0f} s: {found.refused:,} refused in a sentence, "
        f"{found.accepted:,} planned; "
        f"{sum(found.tracebacks.values())} tracebacks, {sum(found.hangs.values())} hangs, "
        f"{sum(found.long_messages.values())} long messages; slowest {found.slowest:.2f} s, "
        f"{gained / 1e6:.0f} MB gained"
    )
    for kind, count in (found.tracebacks + found.hangs + found.long_messages).most_common():
        print(f"{count:>7}  {kind}")
    sys.exit(1 if found.count or gained > MEMORY_BYTES else 0)


if __name__ == "__main__":
    main()
