"""What MonoSoup and DG-Hard do to the same spectra.

Each row is an update of 512 x 512 with the given singular values; kept is ||edited update||_F / ||dW||_F.

Run `python benchmarks/splits.py`: prints the table of docs/dg-hard.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_monosoup.spectral import EditRecord, Mixing, Split, edit_update

SIDE = 512
RULES: tuple[tuple[Split, Mixing], ...] = (
    (Split(), "monosoup"),
    (Split(energy=0.8), "monosoup"),
    (Split("donoho_gavish"), "high"),
    (Split("donoho_gavish"), "monosoup"),
)


def updates() -> dict[str, Tensor]:
    """Return the updates, float64, by what they are called."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def with_spectrum(values: Tensor) -> Tensor:
        left, right = (torch.linalg.qr(normal(SIDE, SIDE)).Q for _ in range(2))
        return (left * values) @ right

    i = torch.arange(1.0, SIDE + 1, dtype=torch.float64)
    noise = normal(SIDE, SIDE) / SIDE**0.5
    signal = torch.where(i <= 16, 1.0, 0.0)
    return {
        "Gaussian noise": noise,
        "Gaussian noise and 16 directions at 5 sigma": noise + with_spectrum(5 * signal),
        "Gaussian noise and 16 directions at 1.5 sigma": noise + with_spectrum(1.5 * signal),
        "s_i = i^(-1/2)": with_spectrum(i**-0.5),
        "s_i = 1 / i": with_spectrum(1 / i),
        "linear, from 1 to 0.1": with_spectrum(torch.linspace(1, 0.1, SIDE, dtype=torch.float64)),
        "s_i = 1 / i up to i = 16, nothing else": with_spectrum(signal / i),
    }


def _kept(record: EditRecord) -> float:
    high, low = record.energy_kept, record.cos_alpha**2
    return float((record.lambda_high**2 * high + record.lambda_low**2 * low) ** 0.5)


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| spectrum | MonoSoup: k | λ_high, λ_low | kept | R = 0.8: k | λ_high, λ_low | kept "
        "| DG-Hard: k | kept | MonoSoup on that split: λ_high, λ_low | kept |",
        "|" + "---|" * 11,
    ]
    for name, dw in updates().items():
        cells = [name]
        for index, (split, mixing) in enumerate(RULES):
            _, record = edit_update(dw, split=split, mixing=mixing)
            factors = f"{record.lambda_high:.3f}, {record.lambda_low:.3f}"
            cells += [f"{record.k:g}"] if index < 3 else []
            cells += [factors] if mixing == "monosoup" else []
            cells.append(f"{_kept(record):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
