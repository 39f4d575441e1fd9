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
from diffusers import ZImagePipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from twostep.errors import ModelError
from twostep.families.zimage import PromptBatch, ZImageVelocity
from twostep.inference.sampler import bind, transition_noise
from twostep.method.rollout import TwoStep, two_step
from twostep.models.folder import (
    LatentSpace,
    PromptEncoder,
    read_index,
    resolve,
    transformer_with,
)
from twostep.models.int8 import wake
from twostep.runtime.files import replace_folder

# What the folder's model_index.json names: the class in its own pipeline.py. Opened as a plain
# ZImagePipeline, diffusers then refuses to load it instead of dropping the second transformer.
CLASS_NAME = ["pipeline", "TwoStepPipeline"]
STANDALONE = Path(__file__).parents[1] / "models" / "standalone_pipeline.py"

StepCallback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class TwoStepOutput(BaseOutput):
    """`images`, and `previews` (after step 1) if they were asked for; PIL or as `output_type`."""

    images: Any
    previews: Any = None


class TwoStepPipeline(ZImagePipeline):
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
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition)
        self.encoder = PromptEncoder(tokenizer, text_encoder, cache_size=256)
        self._fields: dict[str, ZImageVelocity] = {}

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> TwoStepPipeline:
        """Opens a student folder, `zoo:NAME` or a hub id; keywords as in diffusers.

        The folder's `pipeline.py` is for those without this package and is not run.

        Raises:
            ModelError: if there is no such folder, or it is no two-step student.
        """
        folder = resolve(os.fspath(model))
        if "transformer_2" not in read_index(folder):
            raise ModelError(f"{folder} has no transformer_2: it is no two-step student")
        pipe: TwoStepPipeline = super().from_pretrained(folder, **kwargs)
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers', with this class in place of the folder's own file."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """diffusers', with the `pipeline.py` that opens the folder without this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(STANDALONE, Path(save_directory) / "pipeline.py")
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
        space = LatentSpace.of(self.transformer.config, self.vae_scale_factor)
        sides = space.shape(height, width)
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
        schedule = TwoStep(self.config.step2_sigma, self.config.transition)
        fresh = transition_noise(noise) if schedule.transition == "renoise" else None

        def first(x: Tensor, sigma: Tensor) -> Tensor:
            return bind(self._field("transformer"), prompts)(x, sigma)

        def second(x: Tensor, sigma: Tensor) -> Tensor:
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, 0, 1.0, {"latents": x}).get("latents", x)
            return bind(self._field("transformer_2"), prompts)(x, sigma)

        rollout = two_step(first, second, noise, schedule, transition_noise=fresh)
        result = rollout.clean2
        if callback_on_step_end is not None:
            outputs = callback_on_step_end(self, 1, schedule.step2_sigma, {"latents": result})
            result = outputs.get("latents", result)
        images = self._finish(result, output_type)
        previews = self._finish(rollout.clean1, output_type) if return_preview else None
        self.maybe_free_model_hooks()
        return TwoStepOutput(images=images, previews=previews)

    def _field(self, name: str) -> ZImageVelocity:
        """The named transformer as a velocity field; its rope tables are computed once."""
        transformer, field = getattr(self, name), self._fields.get(name)
        wake(transformer)
        if field is None or field.transformer is not transformer:
            field = self._fields[name] = ZImageVelocity(transformer)
        return field

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


def save_student(
    teacher: Path,
    first: Any,
    second: Any,
    schedule: TwoStep,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a student as a diffusers folder: the teacher's parts and two transformers.

    Args:
        teacher: the teacher's folder; everything but its transformer is copied.
        first, second: `ZImageTransformer2DModel`s; not changed.
        folder: replaced if it exists, at the very end.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for part in ("scheduler", "text_encoder", "tokenizer", "vae"):
        shutil.copytree(teacher / part, temporary / part)
    for name, transformer in (("transformer", first), ("transformer_2", second)):
        _save_transformer(transformer, temporary / name, dtype)
    index = read_index(teacher)
    shutil.copyfile(STANDALONE, temporary / "pipeline.py")
    index["_class_name"] = CLASS_NAME
    index["transformer_2"] = index["transformer"]
    index["step2_sigma"] = schedule.step2_sigma
    index["transition"] = schedule.transition
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    replace_folder(temporary, folder)


def _save_transformer(transformer: Any, folder: Path, dtype: torch.dtype) -> None:
    weights = {k: v.detach().to("cpu", dtype) for k, v in transformer.state_dict().items()}
    transformer_with(transformer, weights).save_pretrained(folder)
