"""`TwoStepPipeline`: a diffusers pipeline with one transformer for each of its two steps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from twostep.families import FAMILIES
from twostep.families.family import Family, LatentSpace, PromptBatch
from twostep.families.zimage_network import ZImageVelocity
from twostep.inference.stock_call import StepCallback, StepEnd, lora_scale
from twostep.method.rollout import VelocityField, first_step, second_step
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.locate import Hub
from twostep.models.lora_files import read_lora
from twostep.models.prompt_encoder import MAX_TOKENS, PromptEncoder
from twostep.models.standalone_pipeline import StepLoras, StockParts, warn_of_fixed
from twostep.models.student import CLASS_NAME, STANDALONE
from twostep.models.student_index import read_sizes, sizes_text
from twostep.models.velocity import bind
from twostep.runtime.checksums import NAME as CHECKSUMS

# What diffusers calls a LoRA file in a folder.
_LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass
class TwoStepOutput(BaseOutput):
    """`images`, and `previews` (after step 1) if they were asked for; PIL or as `output_type`."""

    images: Any
    previews: Any = None


class TwoStepPipeline(StockParts, StepLoras, ZImagePipeline):
    """Text to image in two steps.

    The schedule comes from the folder, never from a scheduler's defaults. `transformer` runs at
    sigma 1, `transformer_2` at `step2_sigma`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageVelocity | ZImageTransformer2DModel,
        transformer_2: ZImageVelocity | ZImageTransformer2DModel,
        step2_sigma: float = 0.75,
        transition: str = "euler",
        sizes: str = "",
    ) -> None:
        # At once, before anything is hung on their forward.
        family = FAMILIES[type(transformer).__name__]
        transformer, transformer_2 = map(family.as_velocity, (transformer, transformer_2))
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step2_sigma=step2_sigma, transition=transition, sizes=sizes)
        most = min(MAX_TOKENS, family.caption_tokens(transformer.config))
        self.encoder = PromptEncoder(tokenizer, text_encoder, cache_size=256, max_tokens=most)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> TwoStepPipeline:
        """Opens a student folder, `zoo:NAME` or a hub id; keywords as in diffusers.

        All parts are of `dtype`, fp32 unless told, the text encoder too. The folder's `pipeline.py`
        is for those without this package and is not run. Two LoRA files are merged into a
        transformer each; `Sampler` holds the teacher's weights once.

        Raises:
            ModelError: if there is no such folder, or it is no two-step student.
        """
        folder = ModelFolder.open(os.fspath(model), hub=Hub.of(kwargs))
        index = folder.check_student("model")
        options = kwargs | {"trust_remote_code": False, "use_safetensors": True}
        dtype = options.pop("torch_dtype", None)
        dtype = options["dtype"] = options.get("dtype") or dtype or torch.float32
        if index.kind == "lora_pair":
            by_part = dtype if isinstance(dtype, dict) else {"default": dtype}
            for name in ("transformer", "transformer_2"):
                wanted = by_part.get(name, by_part.get("default", torch.float32))
                options[name] = folder.stored_transformer(name, wanted)
            options |= {"step2_sigma": index.step2_sigma, "transition": index.transition}
        options.setdefault("sizes", sizes_text(folder.sizes))
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
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        return_preview: bool = False,
    ) -> TwoStepOutput | tuple[Any, ...]:
        """Generates images; the arguments are `ZImagePipeline`'s.

        Args:
            prompt: one or more prompts; or give `prompt_embeds`, one (tokens, D) tensor each.
            height, width: pixels, multiples of twice the VAE's scale; None: what the model was made
                for.
            num_inference_steps, sigmas, guidance_scale, negative_prompt, negative_prompt_embeds:
                fixed (2, the student's own, 0, none): others are warned about and ignored, and so
                the two `cfg_` arguments, which shape guidance, have nothing to do.
            latents: initial noise (images, C, H, W); drawn from `generator` if None.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as in diffusers after each step, with what
                `callback_on_step_end_tensor_inputs` names; may return None. A callback that sets
                `pipe._interrupt` keeps the second step from running.
            max_sequence_length: tokens of a caption; what is longer is cut.
            return_preview: also return the image that step 1 points to.

        Raises:
            ValueError: naming the argument, before any network runs.
        """
        warn_of_fixed(
            num_inference_steps=None if num_inference_steps == 2 else num_inference_steps,
            guidance_scale=guidance_scale or None,
            sigmas=sigmas,
            negative_prompt=negative_prompt or None,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        on_step = StepEnd(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        count = self._count(prompt, prompt_embeds)
        copies = 1 if num_images_per_prompt is None else num_images_per_prompt
        if copies < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {copies}")
        size = self._size(height, width)
        shape = (count * copies, *self._space().shape(*size))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        if latents is not None and not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite, got NaN or infinity")

        self._guidance_scale, self._joint_attention_kwargs = 0.0, joint_attention_kwargs
        self._num_timesteps, self._interrupt = 2, False
        device = self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._encode(prompt, max_sequence_length)
        embeds = [e for e in prompt_embeds for _ in range(copies)]
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        noise = latents.to(device, torch.float32)
        shift = self._family().shift(self.scheduler.config, size)
        schedule = Schedule(shift, self.config.step2_sigma, self.config.transition)

        with self.progress_bar(total=2) as bar:
            between = first_step(self._field("transformer", embeds), noise, schedule)
            tensors: dict[str, Any] = {"latents": between.latents2, "prompt_embeds": embeds}
            on_step(self, 0, 1.0, tensors)
            bar.update()
            if not self.interrupt:
                second = self._field("transformer_2", tensors["prompt_embeds"])
                tensors["latents"] = second_step(second, tensors["latents"], schedule)
                on_step(self, 1, schedule.step2_sigma, tensors)
                bar.update()
        images = self._decode(tensors["latents"], output_type)
        previews = self._decode(between.clean1, output_type) if return_preview else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, previews) if return_preview else (images,)
        return TwoStepOutput(images=images, previews=previews)

    def _family(self) -> Family:
        return FAMILIES[type(self.transformer).__name__]

    def _field(self, name: str, embeds: list[Tensor]) -> VelocityField:
        """A step's velocity with the batched forward; adapters and hooks on it stay."""
        transformer = getattr(self, name)
        prompts = PromptBatch.collate(embeds, self._execution_device)
        bound = bind(self._family().as_velocity(transformer), prompts)

        def field(latents: Tensor, sigma: Tensor) -> Tensor:
            with lora_scale(transformer, self._joint_attention_kwargs):
                return bound(latents, sigma)

        return field

    def _space(self) -> LatentSpace:
        return self._family().latent_space(self.transformer.config, self.vae_scale_factor)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """By default what the student says that it was made for; else the largest up to 1024, as
        in diffusers, that the model has positions for."""
        space = self._space()
        places = [each * space.patch * space.scale for each in space.positions]
        said = read_sizes(self.config.sizes)
        usual = said[0] if said else (min(1024, places[0]), min(1024, places[1]))
        return (
            usual[0] if height is None else height,
            usual[1] if width is None else width,
        )

    def _encode(self, prompt: str | list[str] | None, most: int) -> list[Tensor]:
        """One (tokens, D) tensor a prompt, of at most `most` tokens."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        encoder = self.encoder
        if most > encoder.max_tokens:  # more than ZImagePipeline takes unless told
            limit = min(most, self._family().caption_tokens(self.transformer.config))
            encoder = PromptEncoder(self.tokenizer, self.text_encoder, max_tokens=limit)
        # The encoder is causal: what is cut off behind leaves the rest as it is.
        return [embeds[:most] for embeds in encoder.encode(prompts)]

    def _count(self, prompt: str | list[str] | None, prompt_embeds: list[Tensor] | None) -> int:
        """How many prompts there are; ValueError for none, or wrong embeddings."""
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
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt must be one or more strings, got {prompt!r}")
        return len(prompts)
