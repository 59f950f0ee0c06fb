"""Write an adapter: the whole folder, or nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from mergekit_monosoup.checkpoint.card import public_name
from mergekit_monosoup.checkpoint.output import told
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
from mergekit_monosoup.lora.adapter import COMPANIONS, Adapter
from mergekit_monosoup.lora.editing import AdapterOptions, EditedAdapter, ModuleRecord

LOG = logging.getLogger(__name__)

RECORD_NAME = "monosoup_edit.json"


def write_adapter(
    edited: EditedAdapter,
    adapters: Sequence[Adapter],
    options: AdapterOptions,
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write an edited adapter in a folder beside `out` and move it into place when it is complete.

    The folder holds adapter_config.json and adapter_model.safetensors as peft writes them, the tokenizer
    files of the first input, what was done to each module (`monosoup_edit.json`) and a model card.

    Raises:
        ConfigurationError: `out` exists and is not to be replaced, or something is left of an earlier run.
        OutputError: another command is writing there, or the folder cannot be written to.
    """
    folder = WorkFolder(out, resumable=False)
    folder.open(overwrite=overwrite)
    try:
        with told(folder.path):
            _write(folder.path, edited, adapters, options)
        folder.finish()
    except BaseException:
        folder.abandon(keep=False)
        raise


def _write(folder: Path, edited: EditedAdapter, adapters: Sequence[Adapter], options: AdapterOptions) -> None:
    provenance = _provenance(adapters, options)
    metadata = {"format": "pt", "mergekit_monosoup": json.dumps(provenance)}
    save_file(edited.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
    _dump(folder / CONFIG_NAME, edited.settings)
    _dump(folder / RECORD_NAME, provenance | {"modules": [_described(r) for r in edited.records]})
    (folder / "README.md").write_text(_card(edited, adapters, options), "utf-8")
    for name in COMPANIONS:
        if (adapters[0].folder / name).is_file():
            shutil.copy(adapters[0].folder / name, folder / name)


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def _provenance(adapters: Sequence[Adapter], options: AdapterOptions) -> dict[str, Any]:
    return {
        "method": "monosoup",
        "paper": "https://arxiv.org/abs/2602.09689",
        "adapters": [public_name(a.source) for a in adapters],
        "options": _settings(options),
    }


def _settings(options: AdapterOptions) -> dict[str, Any]:
    settings = asdict(options)
    split = settings.pop("split")
    return {"split": split.pop("name"), **split, **settings}


def _described(record: ModuleRecord) -> dict[str, Any]:
    edit = record.edit
    described: dict[str, Any] = {"module": record.name, "rank": record.rank, "changed": bool(edit.matrices)}
    if edit.matrices:
        described |= {
            "k": edit.k,
            "effective_rank": edit.effective_rank,
            "rho": edit.rho,
            "cos_alpha": edit.cos_alpha,
            "energy_kept": edit.energy_kept,
            "lambda_high": edit.lambda_high,
            "lambda_low": edit.lambda_low,
        }
    if record.truncation_error:
        described["truncation_error"] = record.truncation_error
    return described


def _card(edited: EditedAdapter, adapters: Sequence[Adapter], options: AdapterOptions) -> str:
    base = str(adapters[0].settings.get("base_model_name_or_path") or "")
    # A folder of this machine is no model for others.
    base = base if base == public_name(base) else ""
    sources = "\n".join(f"- {public_name(a.source)}" for a in adapters)
    kept = "".join(f"- {key}\n" for key in edited.kept)
    header = f"base_model: {json.dumps(base)}\n" if base else ""
    title = "Average of edited adapters" if len(adapters) > 1 else "Edited adapter"
    card = (
        f"---\n{header}library_name: peft\ntags:\n- lora\n- mergekit\n- monosoup\n---\n\n# {title}\n\n"
        f"LoRA factors edited with MonoSoup (arXiv 2602.09689). Inputs:\n\n{sources}\n\n"
        f"Split: {options.split.title}; mixing: {options.mixing}; alpha: {options.alpha:g}; "
        f"rank: {options.rank or 'as before'}. {RECORD_NAME} says what was done to each module.\n"
    )
    return f"{card}\nStored whole and kept as they were:\n\n{kept}" if kept else card
