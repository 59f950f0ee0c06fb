"""Load results by transformers, and see whether they do what the fine-tuned checkpoint does."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

IDS = torch.arange(4, 24)[None]


def loaded(folder: Path) -> torch.nn.Module:
    """A checkpoint by the class that it names, nothing missing and nothing left over."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, info = model_class.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    found = {key: value for key, value in info.items() if value}
    assert not found, found
    return model.eval()


def output(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits, or the last hidden states of a model without head."""
    with torch.no_grad():
        result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


def assert_same_model(out: Path, tuned: Path, ids: torch.Tensor = IDS) -> None:
    """The result of `alpha: 1, edit: false` gives the fine-tuned checkpoint's numbers exactly."""
    assert torch.equal(output(loaded(out), ids), output(loaded(tuned), ids))
