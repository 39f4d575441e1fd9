"""Stage `tiny-decoder`: a stock `AutoencoderTiny` that decodes the VAE's latents faster.

    python recipes/emoji-teacher/tiny_decoder.py --minutes 12

Also on its own, for a model folder that is finished: latents are the encoded training scenes, the
target is what the VAE makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from autoencoder import CODE_NOISE
from diffusers import AutoencoderTiny
from safetensors import safe_open
from timed_run import TimedRun, warm_then_linear
from torch import Tensor

from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.models.codec import Decoder
from twostep.models.folder import ModelFolder

BATCH = 32


def new_tiny(channels: int, blocks: tuple[int, ...]) -> AutoencoderTiny:
    """Four times up, for 8 latent channels; its encoder is not used and as small as it can be."""
    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(channels,) * len(blocks),
        num_decoder_blocks=blocks,
    )


def load_latents(scenes: Path, shards: int) -> Tensor:
    """Encoded scenes (N, 8, 16, 16), half precision."""
    parts = []
    for path in sorted(scenes.glob("*.safetensors"))[:shards]:
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor("latents"))
    return torch.cat(parts)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: what a mean absolute error alone leaves soft."""
    return images.diff(dim=2), images.diff(dim=3)


def main(
    minutes: Annotated[float, typer.Option()] = 12.0,
    teacher: Annotated[str, typer.Option(help="whose VAE is the target")] = "zoo:emoji-teacher",
    work: Annotated[Path, typer.Option(help="folder with scenes/")] = Path("build"),
    shards: Annotated[int, typer.Option(min=2)] = 30,
    channels: Annotated[int, typer.Option()] = 32,
    blocks: Annotated[str, typer.Option(help="at each resolution, low to high")] = "2,2,0",
) -> None:
    """Trains it and writes WORK/tiny-decoder."""
    decoder = Decoder.load(ModelFolder.open(teacher).base)
    torch.manual_seed(0)
    tiny = new_tiny(channels, tuple(int(b) for b in blocks.split(",")))
    student = tiny.decoder.train().to(memory_format=torch.channels_last)
    latents = load_latents(work / "scenes", shards)
    held_out = latents[:256].float()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.99))
    run = TimedRun(work / "tiny-decoder.pt", minutes, {"tiny": student, "optimizer": optimizer})
    for progress in run:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_linear(progress, run.steps, 50)
        rng = np.random.default_rng((4, run.steps))
        rows = torch.from_numpy(rng.integers(256, len(latents), BATCH))
        part = latents[rows].float()
        # A student's latents are not quite those of any image.
        part = part + CODE_NOISE * torch.from_numpy(rng.standard_normal(part.shape)).float()
        target = decoder.decode(part)
        found = student(part.to(memory_format=torch.channels_last))
        loss = (found - target).abs().mean()
        for a, b in zip(edges(found), edges(target), strict=True):
            loss = loss + (a - b).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if run.steps % 20 == 0:
            run.values = {"psnr": peak_signal_to_noise(found.detach(), target).mean().item()}

    tiny.eval()
    with torch.no_grad():
        decibels = peak_signal_to_noise(
            tiny.decoder(held_out).clamp(-1, 1), decoder.decode(held_out)
        ).mean()
    tiny.save_pretrained(work / "tiny-decoder")
    print(f"tiny decoder: {decibels.item():.2f} dB to the VAE on 256 held-out scenes", flush=True)


if __name__ == "__main__":
    typer.run(main)
