"""Stage `vae`: trains the AutoencoderKL on freshly drawn scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from timed_run import TimedRun, warm_then_linear
from torch import Tensor

from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import sample_training_scene
from twostep.evaluation.metrics import peak_signal_to_noise

BATCH = 32
# A fixed small noise on the code makes the decoder tolerant of the denoiser's errors; a learned
# posterior width with a KL weight held reconstruction at 26 dB (docs/log.md).
CODE_NOISE = 0.05


def new_autoencoder() -> AutoencoderKL:
    """4x down, 8 channels: at 64 pixels, 8x with 16 channels stays under 30 dB (docs/log.md)."""
    return AutoencoderKL(
        latent_channels=8,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def draw_batch(sprites: tuple, rng: np.random.Generator, count: int) -> Tensor:
    scenes = [sample_training_scene(rng) for _ in range(count)]
    return to_pixels(np.stack([render(scene, sprites, rng).image for scene in scenes]))


def train_autoencoder(
    art: Path, work: Path, minutes: float, device: str, start: Path | None = None
) -> None:
    """Writes `work/vae`. `start` is a folder whose weights training begins with."""
    sprites = load_sprites(art)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(start) if start else new_autoencoder()
    vae.to(device, torch.float32).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2.5e-3, betas=(0.9, 0.99))
    peak = 1.2e-3 if start else 2.5e-3
    run = TimedRun(work / "vae.pt", minutes, {"vae": vae, "optimizer": optimizer})
    for progress in run:
        for group in optimizer.param_groups:
            group["lr"] = peak * warm_then_linear(progress, run.steps, 50)
        rng = np.random.default_rng((1, run.steps))
        pixels = draw_batch(sprites, rng, BATCH).to(device)
        with torch.autocast(device, torch.bfloat16):
            code = vae.encode(pixels).latent_dist.mean
            decoded = vae.decode(code + CODE_NOISE * torch.randn_like(code)).sample
        decoded = decoded.float()
        error = decoded - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-5 * code.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if run.steps % 20 == 0:
            run.values = {"psnr": peak_signal_to_noise(decoded.detach(), pixels).mean().item()}

    vae.eval()
    held_out = draw_batch(sprites, np.random.default_rng(99), 256).to(device)
    with torch.no_grad():
        code = vae.encode(held_out).latent_dist.mean
        decibels = peak_signal_to_noise(vae.decode(code).sample, held_out).mean().item()
    # Latents as the transformer sees them have mean 0 and standard deviation 1.
    mean, std = code.mean().item(), code.std().item()
    vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    vae.save_pretrained(work / "vae")
    print(f"vae: {decibels:.2f} dB on 256 held-out scenes", flush=True)
