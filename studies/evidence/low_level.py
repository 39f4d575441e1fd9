"""How rough pictures are: power at high spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

# Cycles a pixel; .5 is the most that pixels can hold.
HIGH = 0.25


def high_frequency_power(images: Tensor) -> Tensor:
    """(N,) natural logarithm of the mean power of luminance above a quarter cycle a pixel.

    Args:
        images: (N, 3, H, W) in -1..1.
    """
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    luminance = (images * weights).sum(1)
    power = torch.fft.fft2(luminance - luminance.mean((1, 2), keepdim=True)).abs().square()
    rows = torch.fft.fftfreq(images.shape[2])
    columns = torch.fft.fftfreq(images.shape[3])
    radius = torch.hypot(rows[:, None], columns[None])
    return power[:, radius > HIGH].mean(1).clamp_min(1e-12).log()
