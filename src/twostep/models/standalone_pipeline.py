"""The `pipeline.py` of a student folder: two steps with nothing but diffusers and torch.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs this file. With the package
`twostep` installed, `twostep.TwoStepPipeline` opens the same folder and runs faster.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image import ZImagePipelineOutput
from transformers import AutoTokenizer, PreTrainedModel


class StepLoras:
    """LoRA files on both transformers, where diffusers' own loader reaches the first alone.

    Stands before `ZImagePipeline` among the bases; diffusers wants one pipeline in a file.
    A scale for each step: `set_adapters("style", {"transformer": 0.8, "transformer_2": 0.5})`.
    """

    _lora_loadable_modules = ("transformer", "transformer_2")
    transformer: Any
    lora_state_dict: Any
    load_lora_into_transformer: Any

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
        pipeline: Any = super()
        pipeline.fuse_lora(components or list(self._lora_loadable_modules), *arguments, **options)

    def unfuse_lora(self, components: Any = None, **options: Any) -> None:
        """As `fuse_lora`, undone."""
        pipeline: Any = super()
        pipeline.unfuse_lora(components or list(self._lora_loadable_modules), **options)


class StockParts:
    """What clients ask of every diffusers pipeline, where Z-Image's lacks it or does it wrongly.

    Stands before `ZImagePipeline` among the bases.
    """

    vae: Any
    image_processor: Any

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """diffusers', which writes into a list of prompts: here into a copy."""
        copy = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
        pipeline: Any = super()
        return pipeline.encode_prompt(copy, *args, **kwargs)

    def enable_vae_tiling(self) -> None:
        """Decodes large pictures in tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes whole pictures again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decodes one picture of a batch after another."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes whole batches again."""
        self.vae.disable_slicing()

    def _decode(self, latents: torch.Tensor, output_type: str | None) -> Any:
        if output_type == "latent":
            return latents
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(image, output_type=output_type)


class TwoStepPipeline(StockParts, StepLoras, ZImagePipeline):
    """Text to image in two steps: `transformer` at sigma 1, `transformer_2` at `step2_sigma`."""

    transformer: Any
    prepare_latents: Any
    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageTransformer2DModel,
        transformer_2: ZImageTransformer2DModel,
        step2_sigma: float = 0.75,
        transition: str = "euler",
        sizes: str = "",
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition, sizes=sizes)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 2,
        sigmas: list[float] | None = None,
        guidance_scale: float = 0.0,
        cfg_normalization: bool = False,
        cfg_truncation: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        return_preview: bool = False,
    ) -> Any:
        """As `ZImagePipeline`'s, in two steps and without guidance.

        Steps, sigmas, guidance and negative prompts are fixed: others are warned about and ignored.
        With `return_preview` the output has `previews`, too: the image that step 1 points to.
        """
        warn_of_fixed(
            num_inference_steps=None if num_inference_steps == 2 else num_inference_steps,
            guidance_scale=guidance_scale or None,
            sigmas=sigmas,
            negative_prompt=negative_prompt or None,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        height, width = self._sides(height, width)
        sigma, shift = self.config.step2_sigma, self.scheduler.config.shift
        noise: list[torch.Tensor] = []
        previews: list[torch.Tensor] = []
        first, prepare_latents = self.transformer, self.prepare_latents

        def keep_noise(*args: Any, **kwargs: Any) -> torch.Tensor:
            start: torch.Tensor = prepare_latents(*args, **kwargs)
            noise.append(start)
            return start

        def on_step(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found = tensors["latents"]
            if step == 0:
                pipe.transformer = pipe.transformer_2
                start = noise[0]
                clean = start - (start - found) / (1 - sigma)
                previews.append(clean)
                if pipe.config.transition == "renoise":
                    found = (1 - sigma) * clean + sigma * _fresh_noise(start)
            if callback_on_step_end is None:
                return {"latents": found}
            tensors = {**tensors, "latents": found}
            asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            return {"latents": found, **(callback_on_step_end(pipe, step, time, asked) or {})}

        self.prepare_latents = keep_noise
        try:
            (images,) = super().__call__(
                prompt,
                height,
                width,
                sigmas=[1.0, sigma / (shift - (shift - 1) * sigma)],  # before the time shift
                num_inference_steps=2,
                guidance_scale=0.0,
                num_images_per_prompt=num_images_per_prompt or 1,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                output_type=output_type,
                return_dict=False,
                joint_attention_kwargs=joint_attention_kwargs,
                callback_on_step_end=on_step,
                callback_on_step_end_tensor_inputs=["latents", *callback_on_step_end_tensor_inputs],
                max_sequence_length=min(max_sequence_length, self._most_tokens()),
            )
        finally:
            self.transformer = first
            del self.prepare_latents
        shown = self._decode(previews[0], output_type) if return_preview else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, shown) if return_preview else (images,)
        output = ZImagePipelineOutput(images=images)
        if return_preview:
            output["previews"] = shown
        return output

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """diffusers', with this file, without which the folder could not be opened."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "pipeline.py"
        if not target.exists() or not target.samefile(__file__):
            shutil.copyfile(__file__, target)
        (folder / "checksums.json").unlink(missing_ok=True)  # of what was there before
        super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """`model_index.json`, whose class is the one in this file."""
        config = {
            **json.loads(super().to_json_string()),
            "_class_name": ["pipeline", type(self).__name__],
        }
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size, by default what the folder says that the student was made for, or the largest
        up to 1024 that the model has positions for."""
        sides, said = [], (self.config.sizes.split() or [""])[0].partition("x")
        usual = {"width": int(said[0] or 1024), "height": int(said[2] or 1024)}
        places = self.transformer.config.axes_lens[1:]
        for name, side, most in zip(("height", "width"), (height, width), places, strict=True):
            most *= 2 * self.vae_scale_factor
            if side is not None and side > most:
                raise ValueError(f"{name} must be at most {most} for this model, got {side}")
            sides.append(side or min(usual[name], most))
        return sides[0], sides[1]

    def _most_tokens(self) -> int:
        """Of a caption: the image's tokens stand after its end, padded to 32."""
        return (int(self.transformer.config.axes_lens[0]) - 2) // 32 * 32


def warn_of_fixed(**values: Any) -> None:
    """Warns the caller of `__call__` of each argument that is not None: a student takes none.

    Not refused, since clients send their own defaults (SGLang 30 steps, vLLM-Omni 1 at its start).
    """
    for name, value in values.items():
        if value is not None:
            shown = repr(value) if isinstance(value, int | float | str) else "what was given"
            warnings.warn(
                f"{name} is fixed in a two-step student: {shown} is ignored", stacklevel=4
            )


def _fresh_noise(noise: torch.Tensor) -> torch.Tensor:
    """Noise for the re-noised transition, a function of each image's own initial noise."""
    fresh = []
    for image in noise:
        bits = image.detach().cpu().float().contiguous().view(torch.int32)
        seed = int(bits.to(torch.int64).sum().abs().item())
        generator = torch.Generator().manual_seed(seed)
        fresh.append(torch.randn(image.shape, generator=generator))
    return torch.stack(fresh).to(noise.device)
