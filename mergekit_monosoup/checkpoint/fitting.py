"""Whether the files of one model may lie beside the weights of another."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_monosoup.checkpoint.headers import StoredTensor
from mergekit_monosoup.errors import InputError


def check_fits(model: str, before: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse the files of another model than the one whose weights are there.

    Args:
        model: what messages call the source of the files.
        before: its tensors; empty where they are not known.
        shapes: those of the result.

    Raises:
        InputError: the result cannot be a merge of that model.
    """
    # Vocabularies may differ; widths may not. Names may be those of another version of transformers.
    other = [name for name in shapes if name in before and shapes[name][1:] != before[name].shape[1:]]
    if other:
        raise InputError(
            f"the files of {model} do not go with these weights: tensor {other[0]} has another shape there; "
            "name the fine-tuned model of the merge"
        )
