"""`TwoStepPipeline`: a diffusers pipeline with one transformer for each of its two steps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from twostep.families import FAMILIES
from twostep.families.family import Family, LatentSpace, PromptBatch
from twostep.method.rollout import first_step, second_step
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import read_lora
from twostep.models.prompt_encoder import MAX_TOKENS, PromptEncoder
from twostep.models.standalone_pipeline import StepLoras
from twostep.models.student import CLASS_NAME, STANDALONE
from twostep.models.velocity import bind
from twostep.runtime.checksums import NAME as CHECKSUMS

# What diffusers calls a LoRA file in a folder.
_LORA_NAME = "pytorch_lora_weights.safetensors"

StepCallback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class TwoStepOutput(BaseOutput):
    """`images`, and `previews` (after step 1) if they were asked for; PIL or as `output_type`."""

    images: Any
    previews: Any = None


class TwoStepPipeline(StepLoras):
    """Text to image in two steps.

    The schedule comes from the folder, never from a scheduler's defaults. `transformer` runs at
    sigma 1, `transformer_2` at `step2_sigma`.
    """

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
        # At once, before anything is hung on their forward.
        family = FAMILIES[type(transformer).__name__]
        transformer, transformer_2 = map(family.as_velocity, (transformer, transformer_2))
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition)
        most = min(MAX_TOKENS, family.caption_tokens(transformer.config))
        self.encoder = PromptEncoder(tokenizer, text_encoder, cache_size=256, max_tokens=most)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> TwoStepPipeline:
        """Opens a student folder, `zoo:NAME` or a hub id; keywords as in diffusers.

        The folder's `pipeline.py` is for those without this package and is not run. Two LoRA files
        are merged into a transformer each; `Sampler` holds the teacher's weights once.

        Raises:
            ModelError: if there is no such folder, or it is no two-step student.
        """
        folder = ModelFolder.open(os.fspath(model))
        index = folder.check_student("model")
        options = kwargs | {"trust_remote_code": False, "use_safetensors": True}
        if index.kind == "lora_pair":
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32
            names = ("transformer", "transformer_2")
            options |= {name: folder.stored_transformer(name, dtype) for name in names}
            options |= {"step2_sigma": index.step2_sigma, "transition": index.transition}
        pipe: TwoStepPipeline = super().from_pretrained(folder.base, **options)
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers', with this class in place of the folder's own file."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """diffusers', and of local files PEFT's layout, with the alpha that lies beside it."""
        source = pretrained_model_name_or_path_or_dict
        path = None if isinstance(source, dict) else Path(source)
        if path is not None and path.is_dir():
            path = path / (kwargs.get("weight_name") or _LORA_NAME)
        if path is None or path.suffix != ".safetensors" or not path.is_file():
            return super().lora_state_dict(source, **kwargs)
        weights, metadata = read_lora(path)
        converted = super().lora_state_dict(weights)
        return (converted, metadata) if kwargs.get("return_lora_metadata") else converted

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """diffusers', with the `pipeline.py` that opens the folder without this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(STANDALONE, Path(save_directory) / "pipeline.py")
        (Path(save_directory) / CHECKSUMS).unlink(missing_ok=True)  # of what was there before
        super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """`model_index.json`, whose class is the one in the folder's `pipeline.py`."""
        config = json.loads(super().to_json_string())
        return json.dumps({**config, "_class_name": CLASS_NAME}, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_preview: bool = False,
        callback_on_step_end: StepCallback | None = None,
        num_inference_steps: int = 2,
        guidance_scale: float = 0.0,
    ) -> TwoStepOutput:
        """Generates images.

        Args:
            prompt: one or more prompts; or give `prompt_embeds`, one (tokens, D) tensor each.
            height, width: pixels, multiples of twice the VAE's scale.
            latents: initial noise (images, C, H, W); drawn from `generator` if None.
            output_type: "pil", "np", "pt" or "latent".
            return_preview: also return the image that step 1 points to.
            callback_on_step_end: called as in diffusers, with `latents` after each step.
            num_inference_steps, guidance_scale: 2 and 0, for callers that always pass them.

        Raises:
            ValueError: naming the argument, before any network runs.
        """
        if num_inference_steps != 2 or guidance_scale:
            raise ValueError(
                "a two-step student takes num_inference_steps=2 and guidance_scale=0, "
                f"got {num_inference_steps} and {guidance_scale}"
            )
        count = self._count(prompt, prompt_embeds)
        if num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}"
            )
        sides = self._space().shape(height, width)
        shape = (count * num_images_per_prompt, *sides)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        if latents is not None and not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite, got NaN or infinity")

        device = self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self.encoder.encode(
                [prompt] if isinstance(prompt, str) else prompt or []
            )
        embeds = [e for e in prompt_embeds for _ in range(num_images_per_prompt)]
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        noise = latents.to(device, torch.float32)

        prompts = PromptBatch.collate(embeds, device)
        shift = self._family().shift(self.scheduler.config, (height, width))
        schedule = Schedule(shift, self.config.step2_sigma, self.config.transition)

        def after(step: int, sigma: float, tensor: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return tensor
            return callback_on_step_end(self, step, sigma, {"latents": tensor}).get(
                "latents", tensor
            )

        between = first_step(bind(self._velocity("transformer"), prompts), noise, schedule)
        latents2 = after(0, 1.0, between.latents2)
        second = bind(self._velocity("transformer_2"), prompts)
        clean2 = second_step(second, latents2, schedule)
        images = self._finish(after(1, schedule.step2_sigma, clean2), output_type)
        previews = self._finish(between.clean1, output_type) if return_preview else None
        self.maybe_free_model_hooks()
        return TwoStepOutput(images=images, previews=previews)

    def _family(self) -> Family:
        return FAMILIES[type(self.transformer).__name__]

    def _velocity(self, name: str) -> Any:
        """The named transformer with the batched forward; adapters and hooks on it stay."""
        return self._family().as_velocity(getattr(self, name))

    def _space(self) -> LatentSpace:
        return self._family().latent_space(self.transformer.config, self.vae_scale_factor)

    def _count(self, prompt: str | list[str] | None, prompt_embeds: list[Tensor] | None) -> int:
        """How many prompts there are; ValueError for none, empty ones, or wrong embeddings."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give exactly one of prompt and prompt_embeds")
        if prompt_embeds is not None:
            width = self.text_encoder.config.hidden_size
            for e in prompt_embeds:
                if e.ndim != 2 or e.shape[1] != width or not len(e):
                    raise ValueError(
                        f"prompt_embeds must each be (tokens, {width}), got {tuple(e.shape)}"
                    )
            return len(prompt_embeds)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError(f"prompt must be one or more non-empty strings, got {prompt!r}")
        return len(prompts)

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(image, output_type=output_type)
