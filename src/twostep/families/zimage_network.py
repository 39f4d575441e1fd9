"""Z-Image's network: a batched forward over diffusers' own modules.

diffusers' forward takes lists of tensors and loops over them. Here the batch is one tensor, the
modules are the same ones, and the result is the same.

Shapes: B batch, C latent channels, H W latent size, D caption feature size, L caption tokens
padded to a multiple of 32, N image tokens = H/2 * W/2 padded to a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from twostep.families.family import SEQUENCE_MULTIPLE, Prediction, PromptBatch
from twostep.families.zimage import PATCH
from twostep.method.flow import model_time

_PATCH_KEY = f"{PATCH}-1"


class ZImageVelocity(ZImageTransformer2DModel):
    """diffusers' transformer with a forward of its own, a velocity in our convention (`flow.py`).

    Made of a stock transformer by `as_velocity`, never by its constructor.

    Attributes:
        kept: main layers that are not recomputed in the backward pass.
        rope_tables: rotary factors by axis.
    """

    kept: frozenset[int]
    rope_tables: list[Tensor]

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.in_channels)

    @property
    def depth(self) -> int:
        """Number of main layers, the range of `taps`."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.dim)

    def recompute_layers(self, share: float = 1.0, run: Callable[..., Any] | None = None) -> None:
        """Recomputes layers in the backward pass.

        Args:
            share: of the main layers, evenly spread; the refiners' are all recomputed.
            run: what calls a layer so; torch's checkpoint if None.
        """
        self.kept = frozenset(
            i for i in range(self.depth) if int((i + 1) * share) == int(i * share)
        )
        self.enable_gradient_checkpointing(run)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        prompts: PromptBatch,
        taps: tuple[int, ...] = (),
        **stock: Any,
    ) -> Prediction:
        """Velocity at `latents`.

        A list of latents is diffusers' own call and is answered as diffusers does, so that one of
        its pipelines can share the network (`from_pipe`).

        Args:
            latents: (B, C, H, W), H and W even.
            sigma: (B,) in [0, 1], 1 is noise.
            prompts: B captions.
            taps: layers whose hidden states are wanted, 0 to depth - 1, ascending.
        """
        if isinstance(latents, list):
            answer: Any = super().forward(latents, sigma, prompts, **stock)
            return answer
        rows, columns = latents.shape[2] // PATCH, latents.shape[3] // PATCH
        tokens = rows * columns
        dtype = self.all_x_embedder[_PATCH_KEY].weight.dtype
        latents = latents.to(dtype)
        time = self.t_embedder(model_time(sigma.float()) * self.t_scale).type_as(latents)

        image = self.all_x_embedder[_PATCH_KEY](_patchify(latents))
        image = _pad_tokens(image, self.x_pad_token)
        image_rope, caption_rope = self._rope(prompts, rows, columns)
        for layer in self.noise_refiner:
            image = self._run(layer, image, None, image_rope, time)

        positions = torch.arange(prompts.embeds.shape[1], device=latents.device)
        caption = self.cap_embedder(prompts.embeds.to(dtype))
        is_text = (positions < prompts.lengths[:, None])[..., None]
        caption = torch.where(is_text, caption, self.cap_pad_token.to(caption.dtype))
        inside = None
        if not prompts.one_bucket:
            inside = positions < _bucket_lengths(prompts.lengths)[:, None]
        for layer in self.context_refiner:
            caption = self._run(layer, caption, inside, caption_rope)

        hidden = torch.cat([image, caption], dim=1)
        rope = torch.cat([image_rope, caption_rope.expand(len(image_rope), -1, -1)], dim=1)
        mask = None
        if inside is not None:
            mask = torch.cat([inside.new_ones(image.shape[:2]), inside], dim=1)
        tapped = []
        for index, layer in enumerate(self.layers):
            hidden = self._run(layer, hidden, mask, rope, time, keep=index in self.kept)
            if index in taps:
                tapped.append(hidden[:, :tokens])
        output = self.all_final_layer[_PATCH_KEY](hidden[:, :tokens], c=time)
        # Z-Image predicts clean - noise; our velocity is its negative.
        velocity = -_unpatchify(output, rows, columns).float()
        return Prediction(velocity, tuple(tapped))

    def _run(self, layer: nn.Module, *inputs: Any, keep: bool = False) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled() and not keep:
            return self._gradient_checkpointing_func(layer, *inputs)
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


# diffusers looks a model's class up by its name: in its tables for adapters, and in what a model
# or a pipeline writes about itself.
ZImageVelocity.__name__ = ZImageTransformer2DModel.__name__
ZImageVelocity.__module__ = ZImageTransformer2DModel.__module__


def as_velocity(transformer: Any) -> ZImageVelocity:
    """A diffusers transformer as a velocity: the same object, its weights untouched.

    Raises:
        ValueError: for a transformer without patches of 2 x 2.
    """
    if isinstance(transformer, ZImageVelocity):
        return transformer
    if _PATCH_KEY not in transformer.all_x_embedder:
        raise ValueError(
            f"transformer.all_patch_size must contain {PATCH}, "
            f"got {transformer.config.all_patch_size}"
        )
    transformer.__class__ = ZImageVelocity
    transformer.kept = frozenset()
    # diffusers fills these tables in its first forward, which breaks a compiled graph.
    rope = transformer.rope_embedder
    transformer.rope_tables = rope.precompute_freqs_cis(
        rope.axes_dims, rope.axes_lens, theta=rope.theta
    )
    if hasattr(transformer, "_old_forward"):  # accelerate wraps the forward that it found
        transformer._old_forward = MethodType(ZImageVelocity.forward, transformer)
    return transformer


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
