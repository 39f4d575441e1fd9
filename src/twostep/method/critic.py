"""The critic's heads, on hidden states of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Logits from one layer's image tokens: a small convolutional network over the token grid."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.project = nn.Linear(hidden_size, width)
        self.local = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.logits = nn.Conv2d(width, 1, 1)

    def forward(self, hidden: Tensor, rows: int, columns: int) -> Tensor:
        x = nn.functional.silu(self.project(self.norm(hidden.float())))
        x = x.transpose(1, 2).unflatten(2, (rows, columns))
        x = x + nn.functional.silu(self.local(x))
        x = nn.functional.silu(self.down(x))
        return self.logits(x).flatten(1)


class CriticHeads(nn.Module):
    """One head per tapped layer; their logits side by side.

    The backbone's hidden states have already attended to the prompt, so the critic judges image
    and prompt together without a conditioning path of its own.
    """

    def __init__(self, hidden_size: int, layers: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(hidden_size, width) for _ in range(layers))

    def forward(self, hidden: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """hidden: one (B, rows * columns, hidden_size) per head. Returns (B, K) logits.

        Computed in the heads' own fp32, under autocast too: in bf16 a third of the differences
        that the gradient penalty squares would be exactly 0.
        """
        pairs = zip(self.heads, hidden, strict=True)
        with torch.autocast(hidden[0].device.type, enabled=False):
            return torch.cat([head(h, rows, columns) for head, h in pairs], dim=1)
