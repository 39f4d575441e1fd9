"""The `pipeline.py` of a student folder: two steps with nothing but diffusers and torch.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs this file. With the package
`twostep` installed, `twostep.pipeline.TwoStepPipeline` opens the same folder and runs faster.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import ZImagePipeline


class StepLoras(ZImagePipeline):
    """LoRA files on both transformers, where diffusers' own loader reaches the first alone.

    A scale for each step: `set_adapters("style", {"transformer": 0.8, "transformer_2": 0.5})`.
    """

    _lora_loadable_modules = ("transformer", "transformer_2")

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        load_into_transformer_2: bool | None = None,
        **arguments: Any,
    ) -> None:
        """As `ZImagePipeline`'s, into both steps.

        Args:
            load_into_transformer_2: True: into step 2 alone; False: into step 1 alone.

        Raises:
            ValueError: for a file with weights that have no place in the transformer.
        """
        names: list[str] = list(self._lora_loadable_modules)
        parts = [getattr(self, name) for name in names]
        if load_into_transformer_2 is not None:
            parts = parts[1:] if load_into_transformer_2 else parts[:1]
        if adapter_name is None:
            known = [getattr(getattr(self, name), "peft_config", {}) for name in names]
            adapter_name = f"default_{len({key for keys in known for key in keys})}"
        options = {"_pipeline": self, "hotswap": hotswap, "adapter_name": adapter_name}
        if "low_cpu_mem_usage" in arguments:
            options["low_cpu_mem_usage"] = arguments.pop("low_cpu_mem_usage")
        weights, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **arguments
        )
        modules = {f"transformer.{name}" for name, _ in self.transformer.named_modules()}
        # `.lora_A.weight` and its like; LoKr's matrices have other ends.
        strays = [key for key in weights if re.split(r"\.lora_|\.lokr_", key)[0] not in modules]
        if strays or not weights:
            reason = strays[0] if strays else "it is empty"
            raise ValueError(f"the file is no LoRA for this transformer: {reason}")
        for part in parts:
            self.load_lora_into_transformer(
                dict(weights), transformer=part, metadata=metadata, **options
            )

    def fuse_lora(self, components: Any = None, *arguments: Any, **options: Any) -> None:
        """As `ZImagePipeline`'s, in both steps unless `components` says otherwise."""
        super().fuse_lora(components or list(self._lora_loadable_modules), *arguments, **options)

    def unfuse_lora(self, components: Any = None, **options: Any) -> None:
        """As `fuse_lora`, undone."""
        super().unfuse_lora(components or list(self._lora_loadable_modules), **options)


class TwoStepPipeline(StepLoras):
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
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition)

    @torch.no_grad()
    def __call__(self, prompt: Any = None, **arguments: Any) -> Any:
        """As `ZImagePipeline`'s, in two steps and without guidance.

        Raises:
            ValueError: for other steps, sigmas or guidance.
        """
        fixed = {"num_inference_steps": (None, 2), "guidance_scale": (None, 0), "sigmas": (None,)}
        for name, allowed in fixed.items():
            if arguments.pop(name, None) not in allowed:
                raise ValueError(f"{name} is fixed in a two-step student: leave it out")
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
