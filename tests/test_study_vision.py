"""The vision tracks of the robustness study, linear CKA, and the study's figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study_results import made_up_result

pytest.importorskip("sklearn")

from benchmarks.robustness import digits
from benchmarks.robustness.cka import cka_by_block, linear_cka
from benchmarks.robustness.figures import draw_track
from benchmarks.robustness.track import Recipe
from benchmarks.robustness.vision import VisionTrack

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(_step: int, _steps: int, _loss: float) -> None:
    pass


@pytest.fixture(scope="module")
def parts():
    return digits.splits()


def test_splits_share_no_image(parts):
    assert {name: len(part) for name, part in parts.items()} == digits.SPLITS
    assert sum(digits.SPLITS.values()) == 1797
    pictures = [image.tobytes() for part in parts.values() for image in part.images]
    assert len(set(pictures)) == len(pictures)


def test_splits_are_stratified_and_the_same_each_time(parts):
    again = digits.splits()
    for name, part in parts.items():
        shares = np.bincount(part.labels) / len(part)
        assert abs(shares - 0.1).max() < 0.01
        assert part.sha256() == again[name].sha256()


@pytest.mark.parametrize("shift", digits.SHIFTS)
def test_shifts(parts, shift):
    clean = digits.Labelled(parts["test"].images[:40], parts["test"].labels[:40])
    before = clean.images.copy()
    changed = digits.shifted(clean, shift)
    assert changed.sha256() == digits.shifted(clean, shift).sha256()
    assert np.array_equal(clean.images, before)
    assert changed.images.shape == (digits.DRAWS * 40, 8, 8)
    assert changed.images.min() >= 0
    assert changed.images.max() <= 1
    assert np.array_equal(changed.labels, np.tile(clean.labels, digits.DRAWS))
    # Copies differ from the image and from each other, but for occlusions in the same place by chance.
    first, second = changed.images.reshape(digits.DRAWS, 40, 64)
    for a, b in ((first, second), (first, before.reshape(40, 64)), (second, before.reshape(40, 64))):
        assert (abs(a - b).max(1) > 0.01).mean() > 0.8


def test_a_turn_by_a_right_angle_is_exact():
    image = np.arange(64.0).reshape(1, 8, 8)
    turned = digits.affine(image, np.array([90.0]))[0]
    assert any(np.allclose(turned, np.rot90(image[0], k), atol=1e-9) for k in (1, -1))


def test_augmentation_is_seeded_and_leaves_its_source_alone(parts):
    before = parts["pretrain"].images.copy()
    first, again, other = (
        [batch.sha256() for batch in digits.augmented(parts["pretrain"], 16, 3, seed)] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3
    assert np.array_equal(parts["pretrain"].images, before)


def test_clean_batches_show_every_image_once_an_epoch(parts):
    part = digits.Labelled(parts["finetune"].images[:48], parts["finetune"].labels[:48])
    batches = list(digits.clean_batches(part, 16, 6, 0))
    for epoch in (batches[:3], batches[3:]):
        seen = {image.tobytes() for batch in epoch for image in batch.images}
        assert seen == {image.tobytes() for image in part.images}


@pytest.mark.parametrize("name", ["vit", "convnet"])
def test_track(name, tmp_path):
    track = VisionTrack(name, short=True)
    track._steps = 3
    full, lora = Recipe("full", 1e-3, "linear", 3), Recipe("LoRA", 1e-3, "cosine", 3, lora_rank=2)
    state = torch.get_rng_state()
    for run in ("a", "b"):
        track.pretrain(tmp_path / run / "base", quiet)
        track.finetune(tmp_path / run / "base", full, 0, tmp_path / run / "tuned", quiet)
    track.finetune(tmp_path / "a" / "base", full, 1, tmp_path / "seed", quiet)
    assert torch.equal(torch.get_rng_state(), state)
    base, tuned, seed = (weights(tmp_path / f) for f in ("a/base", "a/tuned", "seed"))
    assert same(base, weights(tmp_path / "b" / "base"))
    assert same(tuned, weights(tmp_path / "b" / "tuned"))
    assert not same(tuned, base)
    assert not same(tuned, seed)
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    scores = track.scores(tmp_path / "a" / "tuned")
    assert list(scores) == [track.validation, track.in_distribution, *track.shifts]
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores == track.scores(tmp_path / "b" / "tuned")
    blocks = track.activations(tmp_path / "a" / "tuned")
    assert len(blocks["id"]) == len(blocks["ood"]) == {"vit": 4, "convnet": 6}[name]
    assert {block.dtype for side in blocks.values() for block in side} == {torch.float64}
    if any(recipe.lora_rank for recipe in track.recipes):
        track.finetune(tmp_path / "a" / "base", lora, 0, tmp_path / "lora", quiet)
        assert (tmp_path / "lora" / "adapter_config.json").exists()
    assert set(track.data_card()["splits"]) >= set(digits.SPLITS)


def test_cka_of_a_representation_with_itself_turned_and_scaled():
    x = representation(0, 50, 12)
    turn, _ = torch.linalg.qr(representation(1, 12, 12))
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-14)
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-12)
    y = representation(2, 50, 7)
    assert linear_cka(x, y) == pytest.approx(linear_cka(-0.1 * y - 2, x @ turn), abs=1e-12)
    assert 0 < linear_cka(x, y) < 1


@pytest.mark.parametrize("features", [(12, 7), (90, 7), (90, 120)])
def test_cka_is_the_normalised_hsic(features):
    x, y = (representation(i, 50, width) for i, width in enumerate(features))
    y[:, :5] += x[:, :5]

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        centring = torch.eye(50, dtype=torch.float64) - 1 / 50
        return float(torch.trace(a @ a.T @ centring @ b @ b.T @ centring)) / 49**2

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)
    assert cka_by_block([x, x], [x, y]) == pytest.approx([1, expected])


def test_cka_refuses_different_samples():
    with pytest.raises(ValueError, match="same samples"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_figures(tmp_path, higher_is_better):
    pytest.importorskip("matplotlib")
    result = made_up_result(higher_is_better)
    written = draw_track(result, tmp_path)
    kinds = ("scatter", "curves", "lambda", "cka", "sfgs")
    assert [path.name for path in written] == [f"{result['track']}-{kind}.png" for kind in kinds]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000
    bare = {**result, "pools": [], "lambdas": [], "cka": []}
    assert len(draw_track(bare, tmp_path / "bare")) == 2


def representation(seed: int, samples: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, features, generator=generator, dtype=torch.float64)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
