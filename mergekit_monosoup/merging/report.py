"""The report of a merge that our own command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup.merging.public_recipe import PublicRecipe
from mergekit_monosoup.methods.merge import checkpoint_folder
from mergekit_monosoup.report.inputs import InputHashes
from mergekit_monosoup.report.reader import FILE_NAME
from mergekit_monosoup.report.recorder import Recorder, new_header


def merge_recorder(
    shown: PublicRecipe,
    config: MergeConfiguration,
    options: MergeOptions,
    staging: Path,
    write: bool,
) -> Recorder:
    """Return the recorder of a merge.

    Args:
        shown: the recipe as others may read it.
        config, options: of the merge.
        staging: where the merged model is written.
        write: whether to write `monosoup_report.jsonl`, with the hashes of the inputs.
    """
    header = new_header(
        method=config.merge_method,
        configuration=shown.public(shown.text),
        seed=options.random_seed,
        device=options.device,
    )
    return Recorder(
        header,
        staging / FILE_NAME if write else None,
        hashes=_hashes(config, shown) if write else None,
    )


def _hashes(config: MergeConfiguration, shown: PublicRecipe) -> InputHashes:
    base = config.base_model
    others = sorted((m for m in config.referenced_models() if m != base), key=str)
    models: list[tuple[str, Literal["base", "finetuned"], Path]] = []
    for model in [base, *others] if base is not None else others:
        folder = checkpoint_folder(model)
        if folder is not None:
            models.append((shown.public(str(model)), "base" if model == base else "finetuned", folder))
    return InputHashes(models)
