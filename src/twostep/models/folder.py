"""A model folder, opened once: what it is, where its parts lie, how its noise levels go.

Everything that samples, trains or exports starts here, with a value instead of a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twostep.errors import InputError, ModelError
from twostep.families import FAMILIES
from twostep.families.family import Family, LatentSpace
from twostep.method.schedule import Schedule
from twostep.models.configurations import check_configurations
from twostep.models.foreign import check_finite, check_folder, named
from twostep.models.locate import WEIGHTS, Hub, locate
from twostep.models.student_index import PARTS, STEPS, Size, StudentIndex, read_json
from twostep.models.teachers import find_teacher
from twostep.runtime.checksums import folder_fingerprint, verify
from twostep.runtime.known_folders import remember

if TYPE_CHECKING:  # what reads weights is imported with the first of them
    import torch
    from torch import nn

    from twostep.models.codec import Decoder
    from twostep.models.lora_files import LoraFile
    from twostep.models.prompt_encoder import PromptEncoder
    from twostep.models.velocity import Velocity
    from twostep.runtime.devices import Placement

# What diffusers writes as a VAE's sample_size unless told; Z-Image's own side.
_UNSAID, _SIDE = 32, 1024
_PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")


@dataclass(frozen=True)
class ModelFolder:
    """A teacher, or a student of two transformers or of two LoRA files.

    Attributes:
        name: as the user gave it: a folder, `zoo:NAME` or a hub id.
        path: the folder itself.
        base: the diffusers folder of everything but LoRA files; for most, `path`.
        family: what knows its network.
        student: what it says of its two steps; None for a teacher.
        loras: LoRA files that are part of its weights, added as they are loaded.
    """

    name: str
    path: Path
    base: Path
    family: Family
    student: StudentIndex | None
    loras: tuple[LoraFile, ...] = ()

    @staticmethod
    def open(
        name: str | Path, patterns: Sequence[str] = WEIGHTS, *, hub: Hub | None = None
    ) -> ModelFolder:
        """Reads what the folder says of itself; loads no weights.

        Args:
            patterns: the files that are fetched of a model on the hub.
            hub: how; of the teacher that LoRA files name, all but the revision, which is its own.

        Raises:
            ModelError: if there is no such folder, parts of it are missing, or no family knows it.
        """
        name = str(name)
        hub = hub or Hub()
        path = locate(name, patterns, hub)
        check_folder(path)
        verify(path)
        student = StudentIndex.read(path)
        base = path
        if student is not None and student.teacher is not None:
            base = find_teacher(path, student, patterns, replace(hub, revision=None))
            check_folder(base)
            verify(base)
            if StudentIndex.read(base) is not None:
                raise ModelError(f"{path}: its teacher {student.teacher} is a two-step student")
        return ModelFolder(name, path, base, family=_family(base), student=student)

    def with_loras(self, files: Sequence[LoraFile]) -> ModelFolder:
        """The same model with LoRA files added to its weights, in each of its steps.

        Raises:
            ModelError: for a file that does not fit it; no weights of the model are read.
        """
        if not files:
            return self
        from twostep.models.lora_files import check_loras

        check_loras(files, self.family, self.base)
        return replace(self, loras=(*self.loras, *files))

    @property
    def kind(self) -> Literal["teacher", "student", "lora_pair"]:
        """A LoRA pair is a student, too."""
        return "teacher" if self.student is None else self.student.kind

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of `transformer`, `vae`, `text_encoder` or `scheduler`."""
        names = {"scheduler": "scheduler_config.json"}
        return read_json(self.base / part / names.get(part, "config.json"))

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The transformer's configuration: what makes two models interchangeable."""
        config = self.config("transformer")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @cached_property
    def space(self) -> LatentSpace:
        """Where its images live."""
        scale = 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        return self.family.latent_space(self.architecture, scale)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of the pictures that it was made for, the usual one first.

        As a student says; of others the VAE's `sample_size`, and 1024 where that is diffusers'
        default, as far as the model has positions.
        """
        if self.student is not None and self.student.sizes:
            return self.student.sizes
        said = self.config("vae").get("sample_size")
        side = said if isinstance(said, int) and said not in (True, _UNSAID) and said > 0 else _SIDE
        multiple = self.space.patch * self.space.scale
        height, width = (
            max(multiple, min(side // multiple, most) * multiple) for most in self.space.positions
        )
        return ((height, width),)

    def schedule(self, size: tuple[int, int] | None = None) -> Schedule:
        """Its noise levels for pictures of `size` (height, width); a teacher's own two-step ones.

        Raises:
            ModelError: for a scheduler that the family does not know.
        """
        try:
            shift = self.family.shift(self.config("scheduler"), size)
        except ValueError as error:
            raise ModelError(f"{self.base}: {error}") from error
        if self.student is None:
            return Schedule.of(shift)
        return Schedule(shift, self.student.step2_sigma, self.student.transition)

    def count_steps(self, steps: int | None) -> int:
        """How many steps it takes when asked for `steps`.

        Raises:
            InputError: if it is a student and asked for another number than 2.
        """
        if self.student is None:
            return steps or 8
        if steps not in (None, 2):
            raise InputError(f"steps: {self.name} is a two-step student, got {steps}")
        return 2

    def latent_shape(self, size: tuple[int, int], *, option: str = "size") -> tuple[int, int, int]:
        """(C, H, W) of the latents of a (height, width) picture.

        Raises:
            InputError: naming `option`, for a size that the model does not take.
        """
        try:
            return self.space.shape(*size)
        except ValueError as error:
            raise InputError(f"{option}: {error}") from error

    def check_student(self, option: str) -> StudentIndex:
        """What it says of its two steps.

        Raises:
            ModelError: naming `option`, if it is a teacher.
        """
        if self.student is None:
            raise ModelError(f"{option}: {self.name} is no two-step student")
        return self.student

    def check_teacher(self, option: str) -> None:
        """Raises ModelError, naming `option`, if it is a student: it has no field of its own."""
        if self.student is not None:
            raise ModelError(
                f"{option}: {self.name} is a two-step student, expected a model of one transformer"
            )

    def check_full_student(self, option: str) -> None:
        """Raises ModelError, naming `option`, if it is not a student of two transformers."""
        if self.check_student(option).kind != "student":
            raise ModelError(
                f"{option}: {self.name} is two LoRA files, expected a student of two transformers"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with its weights, LoRA files and their scales, configurations or templates."""
        parts = [folder_fingerprint(folder) for folder in dict.fromkeys((self.path, self.base))]
        parts += [f"{lora.sha256}:{lora.scale!r}" for lora in self.loras]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()

    def public_name(self) -> tuple[str, str | None]:
        """Its name for files that are passed on; of a folder the last name and the fingerprint.

        Where such a folder lies is remembered on this machine (`find_teacher`).
        """
        if not Path(self.name).is_dir():
            return self.name, None
        fingerprint = folder_fingerprint(self.path)
        remember(fingerprint, self.path)
        return self.path.resolve().name, fingerprint

    @property
    def parts(self) -> tuple[str, ...]:
        """The transformers that lie in the folder, in the order of the steps."""
        return PARTS if self.kind == "student" else PARTS[:1]

    def load(self, part: str, dtype: torch.dtype) -> Any:
        """One of its transformers as a velocity, its LoRA files added, on the CPU."""
        with named(self.base / part):
            model = self.family.load(self.base, part, dtype)
            check_finite(model, self.base / part)
        self.add_loras(model)
        return model

    def add_loras(self, model: nn.Module) -> None:
        """Adds its LoRA files to the weights of one of its transformers, in place."""
        if self.loras:
            from twostep.models.lora_files import add_loras

            add_loras(model, self.loras, self.family, self.base)

    def velocities(self, placement: Placement) -> tuple[Velocity, ...]:
        """Its steps, one for a teacher and two for a student, on their device."""
        from twostep.models.offload import place

        if self.kind == "lora_pair":
            from twostep.models.adapters import load_lora_pair

            model = self.load("transformer", placement.dtype)
            with named(self.path):
                steps: tuple[Velocity, ...] = load_lora_pair(
                    model, self.path, self.family, self.base
                )
            check_finite(model, self.path)
            place([model], placement)
            return steps
        models = [self.load(part, placement.dtype) for part in self.parts]
        place(models, placement)
        return tuple(models)

    def velocity(self, step: int, placement: Placement) -> Velocity:
        """One of a student's steps, counted from 0, without the other where it has its own
        weights: a student of two LoRA files has one transformer for both."""
        self.check_student("step")
        if self.kind == "lora_pair":
            return self.velocities(placement)[step]
        from twostep.models.offload import place

        model = self.load(PARTS[step], placement.dtype)
        place([model], placement)
        velocity: Velocity = model
        return velocity

    def stored_transformer(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """A transformer as diffusers has it, LoRA files merged; `dtype` None: as it is stored."""
        from twostep.models.lora_files import add_loras
        from twostep.models.transformer import stored_transformer

        loras, stored = list(self.loras), part
        if self.kind == "lora_pair":
            loras, stored = [self.step_file(part), *loras], PARTS[0]
        transformer = stored_transformer(self.base, stored, self.family.transformer, dtype)
        add_loras(transformer, loras, self.family, self.base)
        check_finite(transformer, self.path / part)
        return transformer

    def step_file(self, part: str) -> LoraFile:
        """Of a student of two LoRA files, the one for `part`."""
        from twostep.models.lora_files import LoraFile

        file = self.path / f"{STEPS[PARTS.index(part)]}.safetensors"
        return LoraFile.open(file, option="model")

    def encoder(
        self,
        placement: Placement,
        *,
        cache_size: int = 4096,
        prompt_cache: Path | None = None,
    ) -> PromptEncoder:
        """Its prompt encoder; weights are read when they are needed."""
        from twostep.models.prompt_encoder import MAX_TOKENS, PromptEncoder

        most = self.family.caption_tokens(self.architecture)
        encoder = PromptEncoder.load(
            self.base, placement.dtype, cache_size, prompt_cache, max_tokens=min(most, MAX_TOKENS)
        )
        return encoder.to(placement.device)

    def decoder(self, placement: Placement, tiny: str | None = None) -> Decoder:
        """Its VAE, or the `AutoencoderTiny` that `tiny` names in its place."""
        import torch

        from twostep.models.codec import Decoder

        decoder = Decoder.load(self.base, placement.dtype)
        if tiny is not None:
            decoder = Decoder.load_tiny(tiny, decoder, placement.dtype)
        check_finite(decoder.vae, self.base / "vae")
        # Convolutions are faster so, on a CPU too.
        decoder.vae.to(placement.device, memory_format=torch.channels_last)
        return decoder


def _family(base: Path) -> Family:
    """The family of a diffusers folder."""
    missing = [part for part in _PARTS if not (base / part).exists()]
    if missing:
        inside = [n for n in ("student", "diffusers") if (base / n / "model_index.json").is_file()]
        inside += [n for n in ("student",) if (base / n / "twostep.json").is_file()]
        hint = f"; did you mean {base / inside[0]}?" if inside else ""
        raise ModelError(f"{base} is no whole diffusers folder: missing {', '.join(missing)}{hint}")
    index = read_json(base / "model_index.json")
    unnamed = [part for part in _PARTS[1:] if part not in index]
    if unnamed:
        raise ModelError(f"{base / 'model_index.json'} does not name {', '.join(unnamed)}")
    name = read_json(base / "transformer" / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"{base}: transformer is {repr(name)[:80]}, "
            f"expected one of {', '.join(sorted(FAMILIES))}"
        )
    check_configurations(base, FAMILIES[name])
    return FAMILIES[name]
