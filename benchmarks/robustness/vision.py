"""The vision tracks: a small ViT and a small ConvNeXt on handwritten digits.

Pre-trained on few, broadly changed images; fine-tuned on more, clean ones: what fine-tuning gains on clean
images it pays for on changed ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    PreTrainedModel,
    ViTConfig,
    get_scheduler,
)

from benchmarks.robustness import digits
from benchmarks.robustness.digits import Labelled
from benchmarks.robustness.track import Progress, Recipe

_BATCH = 64
_WARM_UP = 0.1
_PRETRAINING_SEED = 0
_PRETRAINING = {
    "vit": Recipe("pre-training", 2e-3, "cosine", 1500, weight_decay=0.05),
    "convnet": Recipe("pre-training", 2e-3, "cosine", 1000, weight_decay=0.05),
}
# Roughly the mean and the standard deviation of the pixels.
_MEAN, _SPREAD = 0.3, 0.38
# Images for CKA: that many of the test split, and as many of its changed copies.
_COMPARED = 300


class VisionTrack:
    """A small image classifier, pre-trained on changed digits and fine-tuned on clean ones."""

    measure = "accuracy"
    higher_is_better = True
    validation = "validation"
    in_distribution = "clean"
    shifts = tuple(digits.SHIFTS)

    def __init__(self, name: Literal["vit", "convnet"], short: bool = False) -> None:
        self.name: str = name
        self.short = short
        self.seeds = (0, 1) if short else (0, 1, 2)
        self._steps = _PRETRAINING[name].steps if not short else 100
        steps = 200 if not short else 40
        rate = {"vit": 5e-4, "convnet": 1e-3}[name]
        self.recipes: tuple[Recipe, ...] = (
            Recipe("M-1", rate, "cosine", steps),
            Recipe("M-2", 2 * rate, "linear", steps, weight_decay=0.1),
            Recipe("M-3", 4 * rate, "constant_with_warmup", steps),
        )
        if name == "vit":
            self.recipes += (Recipe("LoRA", 4e-3, "cosine", steps, lora_rank=8),)
        if short:
            self.recipes = tuple(recipe for recipe in self.recipes if recipe.name != "M-2")

    @property
    def architecture(self) -> str:
        """One line for the report."""
        with torch.random.fork_rng():
            model = self._new()
        count = sum(p.numel() for p in model.parameters())
        if self.name == "vit":
            shape = "4 layers, width 64, 4 heads, patches of 2 x 2 pixels"
        else:
            shape = "3 stages of 2 blocks, widths 16, 32 and 64"
        return f"{type(model).__name__}, {shape}, {count:,} parameters"

    def pretrain(self, out: Path, progress: Progress) -> None:
        """Write the base as a transformers checkpoint in float32."""
        recipe = replace(_PRETRAINING[self.name], steps=self._steps)
        batches = digits.augmented(self._splits["pretrain"], _BATCH, self._steps, _PRETRAINING_SEED)
        with torch.random.fork_rng():
            torch.manual_seed(_PRETRAINING_SEED)
            model = self._new()
            _train(model, batches, recipe, progress)
        model.save_pretrained(out)

    def finetune(self, base: Path, recipe: Recipe, seed: int, out: Path, progress: Progress) -> None:
        """Write a float32 transformers checkpoint, or a PEFT adapter if the recipe has a LoRA rank."""
        model: Any = _load(base)
        batches = digits.clean_batches(self._splits["finetune"], _BATCH, recipe.steps, 1000 + seed)
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            if recipe.lora_rank is not None:
                lora = LoraConfig(
                    r=recipe.lora_rank,
                    lora_alpha=2 * recipe.lora_rank,
                    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
                )
                model = get_peft_model(model, lora)
            _train(model, batches, recipe, progress)
        model.save_pretrained(out)

    def scores(self, checkpoint: Path) -> dict[str, float]:
        """Return the accuracy on every test set, a share of 1."""
        model = _load(checkpoint)
        return {name: _accuracy(model, data) for name, data in self._tests.items()}

    def activations(self, checkpoint: Path) -> dict[str, list[Tensor]]:
        """Return each block's output, `[samples, features]` float64, under "id" and under "ood".

        All positions of an image make up its features.
        """
        model = _load(checkpoint)
        blocks = [m for m in model.modules() if type(m).__name__ in ("ViTLayer", "ConvNextLayer")]
        clean = self._tests[self.in_distribution]
        # Every shift in equal shares.
        each = _COMPARED // len(self.shifts)
        changed = torch.cat(
            [_pixels(self._tests[s])[i * each : (i + 1) * each] for i, s in enumerate(self.shifts)]
        )
        return {
            "id": _outputs(model, blocks, _pixels(clean)[:_COMPARED]),
            "ood": _outputs(model, blocks, changed),
        }

    def data_card(self) -> dict[str, object]:
        """Return sizes, sources and SHA-256 of every split."""
        parts = {**self._splits, **{f"test, {s}": self._tests[s] for s in self.shifts}}
        return {
            "source": "sklearn.datasets.load_digits (UCI, Optical Recognition of Handwritten Digits)",
            "seed": digits.SPLIT_SEED,
            "splits": {name: {"images": len(part), "sha256": part.sha256()} for name, part in parts.items()},
        }

    @cached_property
    def _splits(self) -> dict[str, Labelled]:
        return digits.splits()

    @cached_property
    def _tests(self) -> dict[str, Labelled]:
        test = self._splits["test"]
        if self.short:
            test = Labelled(test.images[:150], test.labels[:150])
        return {
            self.validation: self._splits["validation"],
            self.in_distribution: test,
            **{shift: digits.shifted(test, shift) for shift in self.shifts},
        }

    def _new(self) -> PreTrainedModel:
        labels: dict[str, Any] = {
            "id2label": dict(enumerate("0123456789")),
            "image_size": 8,
            "num_channels": 1,
        }
        if self.name == "vit":
            config: Any = ViTConfig(
                patch_size=2,
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=128,
                **labels,
            )
        else:
            # The published initial layer scale of 1e-6 is for deep models and long training.
            config = ConvNextConfig(
                patch_size=1,
                num_stages=3,
                hidden_sizes=[16, 32, 64],
                depths=[2, 2, 2],
                layer_scale_init_value=0.1,
                **labels,
            )
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config)
        return model


def _load(checkpoint: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def _train(model: nn.Module, batches: Iterable[Labelled], recipe: Recipe, progress: Progress) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = get_scheduler(
        recipe.schedule,
        optimizer,
        num_warmup_steps=round(_WARM_UP * recipe.steps),
        num_training_steps=recipe.steps,
    )
    model.train()
    for step, batch in enumerate(batches, start=1):
        logits = model(pixel_values=_pixels(batch)).logits
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        progress(step, recipe.steps, loss.item())
    model.eval()


def _pixels(data: Labelled) -> Tensor:
    return torch.from_numpy((data.images - _MEAN) / _SPREAD).float()[:, None]


@torch.inference_mode()
def _accuracy(model: nn.Module, data: Labelled) -> float:
    logits = torch.cat([model(pixel_values=part).logits for part in _pixels(data).split(256)])
    return (logits.argmax(-1) == torch.from_numpy(data.labels)).double().mean().item()


@torch.inference_mode()
def _outputs(model: nn.Module, blocks: list[nn.Module], pixels: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first.flatten(1).double())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    return seen
