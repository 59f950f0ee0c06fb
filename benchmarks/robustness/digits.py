"""The images of the vision tracks: scikit-learn's digits, their splits, the shifts, the augmentation.

The data set comes with scikit-learn (1797 images of 8 x 8 pixels with values 0 to 16, the test part of
"Optical Recognition of Handwritten Digits", UCI): nothing is downloaded. Everything is computed
from seeds by NumPy and SciPy, in float64, on arrays [images, 8, 8] with values from 0 to 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Images: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int64]

SPLIT_SEED = 0
SHIFT_SEED = 1
SPLITS = {"pretrain": 400, "finetune": 600, "validation": 250, "test": 547}
# Two copies of each test image for each shift.
DRAWS = 2
# Each factor of upsampling makes one step of dilation or erosion a fraction of a pixel.
_FINE = 4


@dataclass(frozen=True)
class Labelled:
    """Images [n, 8, 8] with values from 0 to 1, and their digits [n]."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """Return the digest of the pixels, rounded to 1e-6, and the labels."""
        pixels = np.round(self.images * 1e6).astype("<i4")
        return hashlib.sha256(pixels.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()


def splits() -> dict[str, Labelled]:
    """Return the four disjoint parts of the data, each with the digits in equal shares."""
    bunch = load_digits()
    images, labels = bunch.images / 16.0, bunch.target.astype(np.int64)
    rest = np.arange(len(labels))
    parts = {}
    for name, size in SPLITS.items():
        chosen = rest
        if size < len(rest):
            chosen, rest = train_test_split(
                rest, train_size=size, stratify=labels[rest], random_state=SPLIT_SEED
            )
        parts[name] = Labelled(images[chosen], labels[chosen])
    return parts


def shifted(clean: Labelled, shift: str) -> Labelled:
    """Return DRAWS changed copies of all images; the same ones at every call."""
    number = list(SHIFTS).index(shift)
    rng = np.random.default_rng([SHIFT_SEED, number])
    copies = [SHIFTS[shift](clean.images, draw, rng) for draw in range(DRAWS)]
    return Labelled(np.concatenate(copies).clip(0, 1), np.tile(clean.labels, DRAWS))


def _noise(images: Images, draw: int, rng: np.random.Generator) -> Images:
    return images + rng.normal(0, 0.35, images.shape)


def _blur(images: Images, draw: int, rng: np.random.Generator) -> Images:
    return blurred(images, (0.9, 1.1)[draw % 2])


def _rotation(images: Images, draw: int, rng: np.random.Generator) -> Images:
    degrees = rng.uniform(25, 40, len(images)) * rng.choice((-1, 1), len(images))
    return affine(images, degrees)


def _thickness(images: Images, draw: int, rng: np.random.Generator) -> Images:
    return thickened(images, (5, -4)[draw % 2])


def _occlusion(images: Images, draw: int, rng: np.random.Generator) -> Images:
    rows, columns = (rng.integers(1, 5, len(images)) for _ in range(2))
    axis = np.arange(images.shape[-1])
    down = (axis >= rows[:, None]) & (axis < rows[:, None] + 3)
    across = (axis >= columns[:, None]) & (axis < columns[:, None] + 3)
    return np.where(down[:, :, None] & across[:, None, :], 0.0, images)


def _contrast(images: Images, draw: int, rng: np.random.Generator) -> Images:
    factor = rng.uniform(0.15, 0.35, (len(images), 1, 1))
    return contrasted(images, factor, (0.25, 0.75)[draw % 2])


# Name -> how one draw of it changes the images.
SHIFTS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "noise": _noise,
    "blur": _blur,
    "rotation": _rotation,
    "thickness": _thickness,
    "occlusion": _occlusion,
    "contrast": _contrast,
}


def augmented(data: Labelled, batch: int, batches: int, seed: int) -> Iterator[Labelled]:
    """Yield broadly changed images: turned, moved, scaled, thicker, thinner, blurred, paler, noisy.

    Milder than the shifts, and never occluded: one shift is of a kind that pre-training has not seen.
    """
    rng = np.random.default_rng([seed, batch])
    for _ in range(batches):
        chosen = rng.integers(0, len(data), batch)
        images = affine(
            data.images[chosen],
            rng.uniform(-25, 25, batch),
            rng.uniform(-0.8, 0.8, (batch, 2)),
            rng.uniform(0.85, 1.15, batch),
        )
        images = _some(images, rng, lambda x: thickened(x, rng.choice((-3, 3, 4))))
        images = _some(images, rng, lambda x: blurred(x, rng.uniform(0.4, 0.8)))
        images = _some(
            images,
            rng,
            lambda x: contrasted(x, rng.uniform(0.3, 1, (len(x), 1, 1)), rng.uniform(0.2, 0.8)),
        )
        images = _some(images, rng, lambda x: x + rng.normal(0, rng.uniform(0.05, 0.3), x.shape))
        yield Labelled(images.clip(0, 1), data.labels[chosen])


def clean_batches(data: Labelled, batch: int, batches: int, seed: int) -> Iterator[Labelled]:
    """Yield the images as they are, in a new order each epoch."""
    rng = np.random.default_rng([seed, batch])
    order = np.empty(0, dtype=np.int64)
    for _ in range(batches):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(data))])
        chosen, order = order[:batch], order[batch:]
        yield Labelled(data.images[chosen], data.labels[chosen])


def _some(images: Images, rng: np.random.Generator, change: Callable[[Images], Images]) -> Images:
    """Change a random half of the images."""
    chosen = rng.random(len(images)) < 0.5
    if chosen.any():
        images[chosen] = change(images[chosen])
    return images


def affine(
    images: Images,
    degrees: NDArray[np.float64],
    move: NDArray[np.float64] | None = None,
    scale: NDArray[np.float64] | None = None,
) -> Images:
    """Turn each image by degrees [n] about its centre, move it by [n, 2] pixels, scale it by [n].

    All images in one call of ndimage.map_coordinates, which is some twenty times faster than one call
    of ndimage.rotate for each.
    """
    count, side = len(images), images.shape[-1]
    centre = (side - 1) / 2
    angle = np.deg2rad(degrees)[:, None, None]
    grid = np.arange(side) - centre
    down, across = grid[None, :, None], grid[None, None, :]
    if move is not None:
        down, across = down - move[:, 0, None, None], across - move[:, 1, None, None]
    factor = 1.0 if scale is None else scale[:, None, None]
    rows = (np.cos(angle) * down + np.sin(angle) * across) / factor + centre
    columns = (-np.sin(angle) * down + np.cos(angle) * across) / factor + centre
    which = np.broadcast_to(np.arange(count)[:, None, None], rows.shape)
    return np.asarray(ndimage.map_coordinates(images, [which, rows, columns], order=1))


def blurred(images: Images, sigma: float) -> Images:
    """Blur by a Gaussian with a standard deviation of sigma pixels."""
    return np.asarray(ndimage.gaussian_filter(images, (0, sigma, sigma), mode="constant"))


def thickened(images: Images, size: int) -> Images:
    """Thicken strokes by grey dilation with a square of size/4 pixels; thin them where size is negative."""
    fine = ndimage.zoom(images, (1, _FINE, _FINE), order=1, mode="grid-constant", grid_mode=True)
    change = ndimage.grey_dilation if size > 0 else ndimage.grey_erosion
    changed = change(fine, size=(1, abs(size), abs(size)))
    count, side = images.shape[:2]
    return np.asarray(changed.reshape(count, side, _FINE, side, _FINE).mean((2, 4)))


def contrasted(images: Images, factor: NDArray[np.float64], level: float) -> Images:
    """Draw all values towards a grey level, leaving the share `factor` of their distance."""
    return level + factor * (images - level)
