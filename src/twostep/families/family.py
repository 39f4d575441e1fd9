"""What a model family must bring: its conditioning, its latents, its network as a velocity.

Shapes: B batch, C latent channels, H W latent size, D caption feature size, L caption tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # what a folder says of itself is read without torch
    import torch
    from torch import Tensor, nn

MAX_PIXELS = 2048 * 2048
# Captions are padded to a multiple of this; Z-Image attends to the pad tokens.
SEQUENCE_MULTIPLE = 32


def padded_length(length: int) -> int:
    """Tokens of a caption with its padding."""
    return length + (-length) % SEQUENCE_MULTIPLE


@dataclass(frozen=True)
class PromptBatch:
    """Prompt embeddings of a batch.

    Attributes:
        embeds: (B, L, D); positions past a caption's end hold zeros.
        lengths: (B,) int64, real tokens per caption, at least 1.
        one_bucket: all captions pad to the same multiple of 32, so attention needs no mask.
    """

    embeds: Tensor
    lengths: Tensor
    one_bucket: bool

    @staticmethod
    def collate(prompt_embeds: Sequence[Tensor], device: torch.device | str = "cpu") -> PromptBatch:
        """From ragged embeddings, each (tokens, D).

        Raises:
            ValueError: if the list or one of its members is empty.
        """
        import torch
        from torch import nn
        from torch.nn.utils.rnn import pad_sequence

        lengths = [len(e) for e in prompt_embeds]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"prompt_embeds need at least one token each, got lengths {lengths}")
        buckets = {padded_length(length) for length in lengths}
        padded = pad_sequence(list(prompt_embeds), batch_first=True)
        embeds = nn.functional.pad(padded, (0, 0, 0, max(buckets) - padded.shape[1]))
        return PromptBatch(
            embeds.to(device), torch.tensor(lengths, device=device), len(buckets) == 1
        )

    def __len__(self) -> int:
        return len(self.embeds)

    @staticmethod
    def cat(batches: Sequence[PromptBatch]) -> PromptBatch:
        """The batches one after another, padded to the longest."""
        import torch
        from torch import nn

        longest = max(b.embeds.shape[1] for b in batches)
        embeds = [
            nn.functional.pad(b.embeds, (0, 0, 0, longest - b.embeds.shape[1])) for b in batches
        ]
        one_bucket = all(b.one_bucket and b.embeds.shape[1] == longest for b in batches)
        return PromptBatch(torch.cat(embeds), torch.cat([b.lengths for b in batches]), one_bucket)

    def rows(self, rows: Sequence[int]) -> PromptBatch:
        """Some of these prompts."""
        return PromptBatch(self.embeds[rows], self.lengths[rows], self.one_bucket)

    def replace(self, rows: Tensor, other: PromptBatch) -> PromptBatch:
        """These prompts, but `other`'s in the rows where `rows`, (B,) bool, is true."""
        import torch

        both = PromptBatch.cat([self, other])
        (ours, theirs), (own, their_own) = both.embeds.chunk(2), both.lengths.chunk(2)
        embeds = torch.where(rows[:, None, None], theirs, ours)
        return PromptBatch(embeds, torch.where(rows, their_own, own), both.one_bucket)

    def expand(self, count: int) -> PromptBatch:
        """A batch of one prompt repeated `count` times.

        Raises:
            ValueError: if the batch does not hold exactly one prompt.
        """
        if len(self) != 1:
            raise ValueError(
                f"only a batch of one prompt can be expanded, this one has {len(self)}"
            )
        return PromptBatch(self.embeds.expand(count, -1, -1), self.lengths.expand(count), True)


@dataclass(frozen=True)
class Prediction:
    """What one forward gives.

    Attributes:
        velocity: fp32 (B, C, H, W).
        hidden: hidden states of the image tokens, (B, H/2 * W/2, dim), one per tapped layer.
    """

    velocity: Tensor
    hidden: tuple[Tensor, ...]


class VelocityModel(Protocol):
    """A family's network: an ordinary `nn.Module` whose own forward is the batched one.

    So that adapters, hooks that bring weights in, sharding and compilation see what they expect.

    Attributes:
        config: the network's configuration, as diffusers has it.
        channels: of a latent, C.
        depth: number of main layers, the range of `taps`.
        width: size of a hidden state.
    """

    config: Any
    channels: int
    depth: int
    width: int

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction: ...


@dataclass(frozen=True)
class LatentSpace:
    """Where a model's images live.

    Attributes:
        channels: of a latent.
        scale: pixels per latent, along each side.
        patch: latents per token, along each side.
        positions: the most image tokens, in rows and columns, that the model tells apart.
    """

    channels: int
    scale: int
    patch: int
    positions: tuple[int, int]

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a `height` x `width` image.

        Raises:
            ValueError: if a side is not a positive multiple of a token's or longer than the model
                has positions for, or the image has more than `MAX_PIXELS`.
        """
        multiple = self.patch * self.scale
        if height * width > MAX_PIXELS:
            raise ValueError(f"at most {MAX_PIXELS} pixels, {width}x{height} has {height * width}")
        sides = zip(("height", "width"), (height, width), self.positions, strict=True)
        for name, value, positions in sides:
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")
            if value > positions * multiple:
                raise ValueError(
                    f"{name} must be at most {positions * multiple} for this model, got {value}"
                )
        return self.channels, height // self.scale, width // self.scale


class Family(Protocol):
    """One family of models; the only place that knows its classes and configuration keys.

    Attributes:
        transformer: the class name in the transformer's config.json.
        patch: latents per token, along each side.
    """

    transformer: str
    patch: int

    def load(self, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """A folder's transformer in evaluation mode, on the CPU."""
        ...

    def without_weights(self, folder: Path, part: str, dtype: torch.dtype) -> Any:
        """The same from its configuration alone, in evaluation mode, on the default device."""
        ...

    def lora_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA file's tensors, in any layout, as `transformer.MODULE.lora_A.weight` and `lora_B`.

        Raises:
            ValueError, KeyError: for a layout that is not known.
        """
        ...

    def whole_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A whole transformer's tensors, in diffusers' layout or ComfyUI's, in diffusers'."""
        ...

    def as_velocity(self, transformer: Any) -> Any:
        """A diffusers transformer as a `VelocityModel`: the same object, its weights untouched."""
        ...

    def latent_space(self, transformer: Mapping[str, Any], scale: int) -> LatentSpace:
        """From the transformer's configuration and the VAE's pixels per latent."""
        ...

    def caption_width(self, transformer: Mapping[str, Any]) -> int:
        """D, from the transformer's configuration."""
        ...

    def caption_tokens(self, transformer: Mapping[str, Any]) -> int:
        """The most tokens of a caption that the network has positions for."""
        ...

    def depth(self, transformer: Mapping[str, Any]) -> int:
        """Main layers, from the transformer's configuration."""
        ...

    def blocks(self, transformer: Any) -> Iterable[nn.Module]:
        """The layers that are compiled, sharded and recomputed one by one."""
        ...

    def shift(self, scheduler: Mapping[str, Any], size: tuple[int, int] | None) -> float:
        """The scheduler's time shift for pictures of (height, width).

        Raises:
            ValueError: for a scheduler that the family does not know.
        """
        ...
