"""Write the adapter of a full fine-tune: the whole folder, or nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from mergekit_monosoup.checkpoint.card import public_name
from mergekit_monosoup.checkpoint.output import told
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
from mergekit_monosoup.extraction import Extracted, ExtractOptions
from mergekit_monosoup.lora.adapter import COMPANIONS
from mergekit_monosoup.lora.writer import RECORD_NAME


def write_extracted(
    extracted: Extracted,
    base: str,
    finetuned: str,
    options: ExtractOptions,
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write the adapter in a folder beside `out` and move it into place when it is complete.

    The folder holds what peft writes, what became of each tensor (`monosoup_edit.json`), a model card, and
    the tokenizer files of the fine-tune.

    Raises:
        ConfigurationError: `out` is taken.
        OutputError: the folder cannot be written to.
    """
    folder = WorkFolder(out, resumable=False)
    folder.open(overwrite=overwrite)
    try:
        with told(folder.path):
            _write(folder.path, extracted, base, finetuned, options)
        folder.finish()
    except BaseException:
        folder.abandon(keep=False)
        raise


def _write(folder: Path, extracted: Extracted, base: str, finetuned: str, options: ExtractOptions) -> None:
    settings = asdict(options)
    split = settings.pop("split")
    provenance = {
        "method": "extract",
        "paper": "https://arxiv.org/abs/2602.09689",
        "base": public_name(base),
        "finetuned": public_name(finetuned),
        "options": {"split": split.pop("name"), **split, **settings},
    }
    metadata = {"format": "pt", "mergekit_monosoup": json.dumps(provenance)}
    save_file(extracted.adapter.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
    (folder / CONFIG_NAME).write_text(
        json.dumps(extracted.settings, indent=2, sort_keys=True) + "\n", "utf-8"
    )
    record = provenance | {
        "error": extracted.error,
        "noise": extracted.noise,
        "tensors": [asdict(o) for o in extracted.outcomes],
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(extracted, base, finetuned, options), "utf-8")
    for name in COMPANIONS:
        if (Path(finetuned) / name).is_file():
            shutil.copy(Path(finetuned) / name, folder / name)


def _card(extracted: Extracted, base: str, finetuned: str, options: ExtractOptions) -> str:
    # A folder of this machine is no model for others.
    named = f"base_model: {json.dumps(base)}\n" if base == public_name(base) else ""
    what = "Its update as it is" if options.plain else "Its update edited with MonoSoup (arXiv 2602.09689)"
    return (
        f"---\n{named}library_name: peft\ntags:\n- lora\n- mergekit\n- monosoup\n---\n\n"
        f"# {public_name(finetuned)} as an adapter\n\n"
        f"A full fine-tune of {public_name(base)}. {what}, in factors of rank "
        f"{max(extracted.adapter.ranks.values(), default=0)} at most; {extracted.error:.2%} of its norm are "
        f"left out. {RECORD_NAME} says what became of each tensor.\n"
    )
