"""A track of the study that costs nothing: tiny models, training that is noise, scores that are distances."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import peft
import torch
from checkpoints import build_model, load_tensors, structured_update
from transformers import AutoModelForCausalLM

from benchmarks.robustness.track import Recipe


class ToyTrack:
    """Fine-tuning is a step towards a target, with noise; scores are distances from targets."""

    name = "toy"
    architecture = "toy"
    measure = "distance"
    higher_is_better = False
    validation = "validation"
    in_distribution = "target"
    shifts = ("start", "other")
    recipes = (
        Recipe("M-1", 0.5, "cosine", 2),
        Recipe("M-2", 1.0, "linear", 2),
        Recipe("LoRA", 1.0, "cosine", 2, lora_rank=4),
    )
    seeds = (0, 1)

    def __init__(self, short=False):
        self.short = short
        self.trained = []

    def pretrain(self, out, progress):
        self.trained.append("base")
        build_model("qwen3-tied").save_pretrained(out)
        start = load_tensors(out)
        if "STUDY_TOY" in os.environ:
            aims = {f"aim {name}": w + 0.1 * self._target(w.shape) for name, w in start.items()}
            np.savez(os.environ["STUDY_TOY"], **aims, **{f"start {name}": w for name, w in start.items()})
        progress(1, 1, 0.0)

    def finetune(self, base, recipe, seed, out, progress):
        self.trained.append((recipe.name, seed))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        if recipe.lora_rank is not None:
            targets = ["q_proj", "v_proj", "down_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(r=recipe.lora_rank, target_modules=targets))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if recipe.lora_rank is None or "lora_B" in name:
                    noise = 0.3 * structured_update(weight.shape, generator)
                    weight.add_(0.1 * recipe.learning_rate * (self._target(weight.shape) + noise))
        progress(1, 1, 0.0)
        model.save_pretrained(out)

    def scores(self, checkpoint):
        tensors = load_tensors(Path(checkpoint))
        start = build_model("qwen3-tied").state_dict()
        moved = {name: tensor - start[name] for name, tensor in tensors.items()}
        distance = {name: moved[name] - 0.1 * self._target(moved[name].shape) for name in moved}
        size = sum(d.pow(2).sum() for d in distance.values()).sqrt().item()
        gone = sum(d.pow(2).sum() for d in moved.values()).sqrt().item()
        return {"validation": size + 0.01 * gone, "target": size, "start": gone, "other": size + gone}

    def activations(self, checkpoint):
        tensors = load_tensors(Path(checkpoint))
        blocks = [tensors[f"model.layers.{i}.mlp.up_proj.weight"].double() for i in range(3)]
        return {"id": blocks, "ood": [block.flip(0) for block in blocks]}

    def data_card(self):
        return {"source": "none"}

    @staticmethod
    def _target(shape):
        return structured_update(torch.Size(shape), torch.Generator().manual_seed(1000))
