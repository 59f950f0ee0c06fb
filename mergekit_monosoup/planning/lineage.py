"""Whether the base is the base of the fine-tuned models: by their values, and by what their cards say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergekit_monosoup.checkpoint.card import declared_bases
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.lineage import can_check, copied, sampled_relations, unrelated
from mergekit_monosoup.planning.catalogue import Method
from mergekit_monosoup.planning.models import parse_reference
from mergekit_monosoup.planning.problems import Problems
from mergekit_monosoup.planning.recipe import Recipe


def check_lineage(
    recipe: Recipe,
    method: Method,
    models: Mapping[str, Checkpoint],
    problems: Problems,
    *,
    force: bool = False,
) -> None:
    """Note a base that is none, base and fine-tune swapped, and a copy of the base as the fine-tune.

    Args:
        recipe, method: what to do.
        models: the input checkpoints by name.
        problems: takes the findings.
        force: say nothing of a base that may be none.
    """
    value = recipe.data.get("base_model")
    if value is None or not method.ours:
        return
    base = models[str(parse_reference(value))]
    line = recipe.line("base_model")
    for tuned in models.values():
        if tuned is base or tuned.adapter is not None:
            continue
        if not force and _names_as_base(base, tuned) and not _names_as_base(tuned, base):
            problems.error(
                f"the card of {base.name} says that it was fine-tuned from {tuned.name}, so the two are "
                "swapped: exchange them, or pass --force-base to merge all the same",
                line,
            )
        elif can_check([base, tuned]):
            relations = sampled_relations(base, tuned)
            message = unrelated(base.name, tuned.name, relations)
            if message is not None and not force:
                problems.error(f"{message}, or pass --force-base to merge all the same", line)
            if copied(relations):
                problems.warning(
                    f"{tuned.name} holds the values of {base.name} in all {len(relations)} tensors that were "
                    "sampled; if it is a copy of the base, there is no update to edit",
                    line,
                )


def _names_as_base(child: Checkpoint, parent: Checkpoint) -> bool:
    """Say whether the card of one checkpoint names another as what it was fine-tuned from."""
    path = parse_reference(parent.name).path.rstrip("/").lower()
    last = Path(path).name
    for declared in map(str.lower, declared_bases(child.beside) if child.beside is not None else ()):
        # Folders are mostly called like the model; `base` or `output` is no such name.
        if declared == path or (Path(declared).name == last and re.search(r"\d", last)):
            return True
    return False
