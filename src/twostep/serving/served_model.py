"""Models behind the engine: folders opened, weights loaded and shared, steps on tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twostep.errors import InputError
from twostep.families.family import PromptBatch, padded_length
from twostep.inference.sampler import Sampler
from twostep.method.rollout import euler, first_step, second_step, seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.codec import Decoder
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile
from twostep.models.prompt_encoder import PromptEncoder
from twostep.models.velocity import Velocity, bind
from twostep.runtime.checksums import folder_fingerprint
from twostep.runtime.devices import Placement
from twostep.runtime.images import to_bytes
from twostep.serving.catalogue import Offer
from twostep.serving.jobs import Finished, Handover, PictureSpec, Pixels
from twostep.serving.logs import log

_WARM_PROMPT = "warm-up"


@dataclass(frozen=True)
class ModelChoice:
    """A model that the user wants served.

    Attributes:
        name: what clients call it.
        model: a folder, `zoo:NAME` or a hub id.
        steps: of a teacher; None for its 8, and for a student.
        loras: LoRA files on its weights.
    """

    name: str
    model: str
    steps: int | None = None
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A model's folder and what is offered of it; no weights yet."""

    folder: ModelFolder
    offer: Offer

    @staticmethod
    def of(choice: ModelChoice, *, size: tuple[int, int] | None = None) -> Opened:
        """Opens the folder.

        Args:
            size: (height, width) of a picture where the client names none; None: what the model
                was made for.

        Raises:
            InputError, ModelError: for a model, steps or a size that cannot be used.
        """
        folder = ModelFolder.open(choice.model).with_loras(choice.loras)
        embedded = choice.model.startswith("zoo:")
        size = size or folder.sizes[0]
        folder.latent_shape(size)
        files = [path for path in folder.path.rglob("*") if path.is_file()]
        offer = Offer(
            name=choice.name,
            kind=folder.kind,
            steps=folder.count_steps(choice.steps),
            size=size,
            weights=folder.fingerprint[:16],
            embedded=embedded,
            created=int(max(path.stat().st_mtime for path in files)),
            check_size=folder.latent_shape,
        )
        return Opened(folder, offer)


def open_models(
    choices: Sequence[ModelChoice], *, size: tuple[int, int] | None = None
) -> list[Opened]:
    """Opens every folder.

    Raises:
        InputError, ModelError: for none at all, a name given twice, or one that cannot be used.
    """
    names = [choice.name for choice in choices]
    if not names:
        raise InputError("--model: expected at least one model, got none")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--model: two models are called {twice[0]!r}, give NAME=FOLDER")
    return [Opened.of(choice, size=size) for choice in choices]


@dataclass(frozen=True)
class HoldingOptions:
    """How models are held; as `twostep generate` has it.

    Attributes:
        tiny_decoder: an `AutoencoderTiny` in every VAE's place.
        prompt_cache: a folder in which encoded prompts outlive the process.
        compiled: whether transformers and decoder are compiled; batches are then rounded up to a
            power of two, so that few graphs are enough.
        max_batch: the largest batch, for the warm-up.
    """

    placement: Placement
    tiny_decoder: str | None = None
    prompt_cache: Path | None = None
    compiled: bool = False
    max_batch: int = 8


def load_models(models: Sequence[Opened], options: HoldingOptions) -> dict[str, ServedModel]:
    """Loads the weights and makes a first picture of each: what follows takes its usual time."""
    shared, loaded = SharedParts(options), {}
    for opened in models:
        folder = opened.folder
        loaded[opened.offer.name] = ServedModel(
            shared.sampler(folder, folder.velocities(options.placement)),
            folder,
            steps=opened.offer.steps,
            rounded=options.compiled,
        )
    make_ready(models, loaded, options)
    return loaded


def make_ready(
    models: Sequence[Opened], loaded: Mapping[str, ServedModel], options: HoldingOptions
) -> None:
    """Compiles where that is wanted, and makes pictures that nobody gets."""
    if options.compiled:
        # Once for each module: models may share a decoder.
        seen: set[int] = set()
        for model in loaded.values():
            model.compile(seen)
    for opened in models:
        batches = [1]
        while options.compiled and batches[-1] < options.max_batch:
            batches.append(2 * batches[-1])
        for batch in batches:
            loaded[opened.offer.name].warm_up(opened.offer.size, batch)


@dataclass
class SharedParts:
    """Text encoders and decoders, one for all models whose files are the same."""

    options: HoldingOptions
    _encoders: dict[str, PromptEncoder] = field(default_factory=dict)
    _decoders: dict[str, Decoder] = field(default_factory=dict)

    def sampler(self, folder: ModelFolder, velocities: Sequence[Velocity]) -> Sampler:
        """A model of these steps."""
        return Sampler(
            velocities,
            schedule=folder.schedule(),
            space=folder.space,
            encoder=self.encoder(folder),
            decoder=self.decoder(folder),
            device=self.options.placement.device,
        )

    def encoder(self, folder: ModelFolder) -> PromptEncoder:
        parts = (folder_fingerprint(folder.base / part) for part in ("text_encoder", "tokenizer"))
        key = f"{'-'.join(parts)}-{folder.family.caption_tokens(folder.architecture)}"
        if key not in self._encoders:
            self._encoders[key] = folder.encoder(
                self.options.placement, prompt_cache=self.options.prompt_cache
            )
            # Its own notice has the prompt in it.
            self._encoders[key].on_cut = lambda _, tokens: log("a prompt was cut", tokens=tokens)
        return self._encoders[key]

    def decoder(self, folder: ModelFolder) -> Decoder:
        key = folder_fingerprint(folder.base / "vae")
        if key not in self._decoders:
            self._decoders[key] = folder.decoder(self.options.placement, self.options.tiny_decoder)
        return self._decoders[key]


@dataclass(frozen=True)
class PictureState:
    """A picture between two steps, on the model's device.

    Attributes:
        latents: (C, H, W), what the next step is given; after the last, the result.
        clean1: (C, H, W), what step 1 points to.
        embeds: (tokens, D).
    """

    latents: Tensor
    clean1: Tensor
    embeds: Tensor


class ServedModel:
    """A loaded model in steps (`jobs.StepModel`): a student's two, or a teacher's Euler steps.

    Pictures share a batch only if they have one size and their captions one padded length, so that
    no batch needs an attention mask that a picture alone would not have.
    """

    def __init__(
        self, sampler: Sampler, folder: ModelFolder, *, steps: int, rounded: bool = False
    ) -> None:
        self.sampler, self.folder, self.steps, self.rounded = sampler, folder, steps, rounded

    def compile(self, seen: set[int]) -> None:
        """Compiles what was not `seen` yet."""
        decoder = self.sampler.decoder
        if id(decoder) in seen:
            self.sampler.compile_velocities()
        else:
            self.sampler.compile()
        seen.add(id(decoder))

    def warm_up(self, size: tuple[int, int], batch: int = 1) -> None:
        """Makes pictures that nobody gets."""
        states = self.first([PictureSpec("", _WARM_PROMPT, seed, size) for seed in range(batch)])
        self.preview(states[:1])
        for step in range(1, self.steps):
            states = self.advance(states, step)
        self.finish(states)

    def group(self, spec: PictureSpec) -> Hashable:
        """Size, and the caption's tokens with their padding."""
        return spec.size, padded_length(self.sampler.encoder.count_tokens(spec.prompt))

    @torch.no_grad()
    def first(self, specs: Sequence[PictureSpec]) -> list[PictureState]:
        """Step 1; noise is a function of each picture's own seed."""
        embeds = self.sampler.encoder.encode([spec.prompt for spec in specs])
        shape = self.sampler.noise_shape(*specs[0].size)
        rows = self._rounded(list(range(len(specs))))
        noise = seeded_noise([specs[row].seed for row in rows], shape).to(self.sampler.device)
        prompts = PromptBatch.collate([embeds[row] for row in rows], self.sampler.device)
        field = bind(self.sampler.velocities[0], prompts)
        between = first_step(field, noise, self._schedule())
        more = self.sampler.is_student or self.steps > 1
        latents = between.latents2 if more else between.clean1
        return [
            PictureState(*each)
            for each in zip(latents, between.clean1, embeds, strict=False)  # as many as asked for
        ]

    @torch.no_grad()
    def advance(self, states: Sequence[PictureState], step: int) -> list[PictureState]:
        """A student's step 2, or a teacher's next Euler step."""
        batch = self._rounded(list(states))
        latents = torch.stack([state.latents for state in batch])
        prompts = PromptBatch.collate([state.embeds for state in batch], self.sampler.device)
        schedule = self.sampler.schedule
        if self.sampler.is_student:
            field = bind(self.sampler.velocities[1], prompts)
            latents = second_step(field, latents, schedule)
        else:
            sigmas = schedule.sigmas(self.steps)[step : step + 2]
            latents = euler(bind(self.sampler.velocities[0], prompts), latents, sigmas)
        return [replace(state, latents=row) for state, row in zip(states, latents, strict=False)]

    def preview(self, states: Sequence[PictureState]) -> list[Pixels]:
        return self._decode([state.clean1 for state in states])

    def finish(self, states: Sequence[PictureState]) -> Sequence[Finished | Handover]:
        pictures = self._decode([state.latents for state in states])
        _, height, width = states[0].latents.shape
        tokens = (height // self.sampler.space.patch) * (width // self.sampler.space.patch)
        return [
            Finished(pixels, text_tokens=len(state.embeds), image_tokens=tokens)
            for pixels, state in zip(pictures, states, strict=True)
        ]

    def _schedule(self) -> Schedule:
        """A teacher's first Euler step is step 1 of a student that goes to the same noise level."""
        schedule = self.sampler.schedule
        if self.sampler.is_student or self.steps == 1:
            return schedule
        return Schedule(schedule.shift, schedule.sigmas(self.steps)[1])

    def _decode(self, latents: list[Tensor]) -> list[Pixels]:
        images = self.sampler.decoder.decode(torch.stack(self._rounded(latents)))
        pixels = to_bytes(images[: len(latents)]).permute(0, 2, 3, 1).contiguous()
        return list(pixels.numpy())

    def _rounded(self, rows: list[Any]) -> list[Any]:
        """The rows, for a compiled model with the last one repeated up to a power of two."""
        if not self.rounded:
            return rows
        wanted = 1 << (len(rows) - 1).bit_length()
        return rows + rows[-1:] * (wanted - len(rows))
