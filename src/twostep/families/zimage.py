"""Z-Image: a batched forward over diffusers' own modules, and prompt encoding.

diffusers' forward takes lists of tensors and loops over them. Here the batch is one tensor, the
modules are the same ones, and the result is the same: adapters, attention backends and block-wise
compilation of the diffusers model keep working.

Shapes: B batch, C latent channels, H W latent size, D caption feature size, L caption tokens
padded to a multiple of 32, N image tokens = H/2 * W/2 padded to a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from twostep.method.flow import model_time

# Z-Image pads image and caption tokens, each, to a multiple of this; the pad tokens are attended.
SEQUENCE_MULTIPLE = 32
PATCH = 2
_PATCH_KEY = f"{PATCH}-1"


def _bucket(length: int) -> int:
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
        lengths = [len(e) for e in prompt_embeds]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"prompt_embeds need at least one token each, got lengths {lengths}")
        buckets = {_bucket(length) for length in lengths}
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
        longest = max(b.embeds.shape[1] for b in batches)
        embeds = [
            nn.functional.pad(b.embeds, (0, 0, 0, longest - b.embeds.shape[1])) for b in batches
        ]
        one_bucket = all(b.one_bucket and b.embeds.shape[1] == longest for b in batches)
        return PromptBatch(torch.cat(embeds), torch.cat([b.lengths for b in batches]), one_bucket)

    def replace(self, rows: Tensor, other: PromptBatch) -> PromptBatch:
        """These prompts, but `other`'s in the rows where `rows`, (B,) bool, is true."""
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


class ZImageVelocity(nn.Module):
    """A `ZImageTransformer2DModel` as a velocity field in our convention (`flow.py`).

    Args:
        transformer: the diffusers model; its modules and weights are used as they are.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        if _PATCH_KEY not in transformer.all_x_embedder:
            raise ValueError(
                f"transformer.all_patch_size must contain {PATCH}, "
                f"got {transformer.config.all_patch_size}"
            )
        self.transformer = transformer
        self.kept: frozenset[int] = frozenset()
        # diffusers fills these tables in its first forward, which breaks a compiled graph.
        rope = transformer.rope_embedder
        self.rope_tables: list[Tensor] = rope.precompute_freqs_cis(
            rope.axes_dims, rope.axes_lens, theta=rope.theta
        )

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.transformer.in_channels)

    @property
    def depth(self) -> int:
        """Number of main layers, the range of `taps`."""
        return len(self.transformer.layers)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.transformer.dim)

    def enable_gradient_checkpointing(
        self, share: float = 1.0, run: Callable[..., Any] | None = None
    ) -> None:
        """Recomputes layers in the backward pass.

        Args:
            share: of the main layers, evenly spread; the refiners' are all recomputed.
            run: what calls a layer so; torch's checkpoint if None.
        """
        self.kept = frozenset(
            i for i in range(self.depth) if int((i + 1) * share) == int(i * share)
        )
        self.transformer.enable_gradient_checkpointing(run)

    def forward(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        """Velocity at `latents`.

        Args:
            latents: (B, C, H, W), H and W even.
            sigma: (B,) in [0, 1], 1 is noise.
            prompts: B captions.
            taps: layers whose hidden states are wanted, 0 to depth - 1, ascending.
        """
        model = self.transformer
        rows, columns = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        tokens = rows * columns
        dtype = model.all_x_embedder[_PATCH_KEY].weight.dtype
        latents = latents.to(dtype)
        time = model.t_embedder(model_time(sigma.float()) * model.t_scale).type_as(latents)

        image = model.all_x_embedder[_PATCH_KEY](_patchify(latents))
        image = _pad_tokens(image, model.x_pad_token)
        image_rope, caption_rope = self._rope(prompts, rows, columns)
        for layer in model.noise_refiner:
            image = self._run(layer, image, None, image_rope, time)

        positions = torch.arange(prompts.embeds.shape[1], device=latents.device)
        caption = model.cap_embedder(prompts.embeds.to(dtype))
        is_text = (positions < prompts.lengths[:, None])[..., None]
        caption = torch.where(is_text, caption, model.cap_pad_token.to(caption.dtype))
        inside = None
        if not prompts.one_bucket:
            inside = positions < _bucket_lengths(prompts.lengths)[:, None]
        for layer in model.context_refiner:
            caption = self._run(layer, caption, inside, caption_rope)

        hidden = torch.cat([image, caption], dim=1)
        rope = torch.cat([image_rope, caption_rope.expand(len(image_rope), -1, -1)], dim=1)
        mask = None
        if inside is not None:
            mask = torch.cat([inside.new_ones(image.shape[:2]), inside], dim=1)
        tapped = []
        for index, layer in enumerate(model.layers):
            hidden = self._run(layer, hidden, mask, rope, time, keep=index in self.kept)
            if index in taps:
                tapped.append(hidden[:, :tokens])
        output = model.all_final_layer[_PATCH_KEY](hidden[:, :tokens], c=time)
        # Z-Image predicts clean - noise; our velocity is its negative.
        velocity = -_unpatchify(output, rows, columns).float()
        return Prediction(velocity, tuple(tapped))

    def _run(self, layer: nn.Module, *inputs: Any, keep: bool = False) -> Tensor:
        if self.transformer.gradient_checkpointing and torch.is_grad_enabled() and not keep:
            return self.transformer._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)

    def _rope(self, prompts: PromptBatch, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Rotary factors of image (B or 1, N, F) and caption (1, L, F) tokens, complex64.

        Captions sit at (1 + i, 0, 0); image tokens at (bucket + 1, row, column), where bucket is
        the caption's padded length; padding of the image at (0, 0, 0).
        """
        device = prompts.embeds.device
        if self.rope_tables[0].device != device:
            self.rope_tables = [table.to(device) for table in self.rope_tables]
        frame, row, column = self.rope_tables
        length = prompts.embeds.shape[1]
        zero_row, zero_column = row[:1].expand(length, -1), column[:1].expand(length, -1)
        caption = torch.cat([frame[1 : length + 1], zero_row, zero_column], dim=1)

        lengths = prompts.lengths[:1] if prompts.one_bucket else prompts.lengths
        start = frame[_bucket_lengths(lengths) + 1]
        grid = torch.cat(
            [
                row[:rows, None].expand(-1, columns, -1),
                column[None, :columns].expand(rows, -1, -1),
            ],
            dim=2,
        ).flatten(0, 1)
        image = torch.cat(
            [
                start[:, None].expand(-1, len(grid), -1),
                grid[None].expand(len(start), -1, -1),
            ],
            dim=2,
        )
        padding = (-len(grid)) % SEQUENCE_MULTIPLE
        if padding:
            # Position (0, 0, 0): no rotation.
            image = torch.cat([image, image.new_ones(len(start), padding, image.shape[2])], dim=1)
        return image, caption[None]


def _bucket_lengths(lengths: Tensor) -> Tensor:
    return lengths + (-lengths) % SEQUENCE_MULTIPLE


def _patchify(latents: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, 4 C), the channel varying fastest."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, PATCH * PATCH * c)


def _unpatchify(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `_patchify`."""
    b, _, features = tokens.shape
    patches = tokens.view(b, rows, columns, PATCH, PATCH, features // PATCH**2)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * PATCH, columns * PATCH)


def _pad_tokens(tokens: Tensor, pad_token: Tensor) -> Tensor:
    padding = (-tokens.shape[1]) % SEQUENCE_MULTIPLE
    if not padding:
        return tokens
    pads = pad_token.to(tokens.dtype).expand(len(tokens), padding, -1)
    return torch.cat([tokens, pads], dim=1)
