"""The `pipeline.py` of a student folder: two steps with nothing but diffusers and torch.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs this file. With the package
`twostep` installed, `twostep.pipeline.TwoStepPipeline` opens the same folder and runs faster.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImagePipeline


class TwoStepPipeline(ZImagePipeline):
    """Text to image in two steps: `transformer` at sigma 1, `transformer_2` at `step2_sigma`."""

    transformer: Any
    prepare_latents: Any
    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        transformer_2: Any,
        step2_sigma: float = 0.75,
        transition: str = "euler",
        sizes: str = "",
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition, sizes=sizes)

    @torch.no_grad()
    def __call__(self, prompt: Any = None, **arguments: Any) -> Any:
        """As `ZImagePipeline`'s, in two steps and without guidance, and in the size made for.

        Raises:
            ValueError: for other steps, sigmas or guidance.
        """
        fixed = {"num_inference_steps": (None, 2), "guidance_scale": (None, 0), "sigmas": (None,)}
        for name, allowed in fixed.items():
            if arguments.pop(name, None) not in allowed:
                raise ValueError(f"{name} is fixed in a two-step student: leave it out")
        usual = (self.config.sizes.split() or ["1024x1024"])[0].split("x")
        for name, side in zip(("width", "height"), usual, strict=True):
            if arguments.get(name) is None:
                arguments[name] = int(side)
        user_callback = arguments.pop("callback_on_step_end", None)
        sigma, shift = self.config.step2_sigma, self.scheduler.config.shift
        noise: list[torch.Tensor] = []
        first, prepare_latents = self.transformer, self.prepare_latents

        def keep_noise(*args: Any, **kwargs: Any) -> torch.Tensor:
            latents: torch.Tensor = prepare_latents(*args, **kwargs)
            noise.append(latents)
            return latents

        def on_step(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                pipe.transformer = pipe.transformer_2
                if pipe.config.transition == "renoise":
                    start = noise[0]
                    clean = start - (start - tensors["latents"]) / (1 - sigma)
                    fresh = _fresh_noise(start)
                    tensors["latents"] = (1 - sigma) * clean + sigma * fresh
            if user_callback is not None:
                tensors = {**tensors, **user_callback(pipe, step, time, tensors)}
            return tensors

        self.prepare_latents = keep_noise
        try:
            return super().__call__(
                prompt,
                sigmas=[1.0, sigma / (shift - (shift - 1) * sigma)],  # before the time shift
                num_inference_steps=2,
                guidance_scale=0.0,
                callback_on_step_end=on_step,
                **arguments,
            )
        finally:
            self.transformer = first
            del self.prepare_latents


def _fresh_noise(noise: torch.Tensor) -> torch.Tensor:
    """Noise for the re-noised transition, a function of each image's own initial noise."""
    fresh = []
    for image in noise:
        bits = image.detach().cpu().float().contiguous().view(torch.int32)
        seed = int(bits.to(torch.int64).sum().abs().item())
        generator = torch.Generator().manual_seed(seed)
        fresh.append(torch.randn(image.shape, generator=generator))
    return torch.stack(fresh).to(noise.device)
