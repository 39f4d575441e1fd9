"""Pictures from prompts, as PNG files that say how they were made."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.errors import InputError
from twostep.models.folder import ModelFolder
from twostep.models.tiny_decoders import tiny_folder
from twostep.runtime.devices import Memory, Placement, pick_device
from twostep.runtime.files import make_folder, sweep, write_atomically

if TYPE_CHECKING:  # needed for pictures that are to be made, and for no mistake
    import torch

    from twostep.inference.sampler import Sampler
    from twostep.models.lora_files import LoraFile

# Prompts that are encoded before the transformers are loaded, and remembered: about 1 GB of them.
_ENCODED_FIRST = 2048


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises InputError if there is none, or one is empty."""
    if not prompts or not all(p.strip() for p in prompts):
        raise InputError("prompt: must not be empty")


def check_seeds(first: int, count: int) -> None:
    """Raises InputError unless all of the seeds fit into 63 bits."""
    if not 0 <= first <= 2**63 - count:
        raise InputError(f"seed: {count} seeds from {first} leave 0..2^63 - 1")


@dataclass(frozen=True)
class Picture:
    """A picture on disk.

    Attributes:
        path: a function of prompt, seed and steps; of the rest too, where another has that name.
        preview: the image that step 1 pointed to, if it was asked for.
        made: False if it was there already, made by the same model in the same way.
    """

    path: Path
    prompt: str
    seed: int
    steps: int
    model: str
    preview: Path | None
    made: bool

    def as_json(self) -> str:
        """One line of JSON."""
        record = {
            "path": str(self.path),
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "model": self.model,
            "made": self.made,
        }
        if self.preview is not None:
            record["preview"] = str(self.preview)
        # Every script as it is; what could steer a terminal, escaped as JSON does.
        text = json.dumps(record, ensure_ascii=False)
        return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def open_model(
    model: str, *, size: tuple[int, int] | None, steps: int | None, loras: Sequence[LoraFile] = ()
) -> ModelFolder:
    """The model's folder, once the arguments fit it; loads no weights.

    Args:
        size: (height, width) in pixels; None: the model's own.
        loras: are added to the weights of each of its steps.

    Raises:
        InputError, ModelError: for what does not fit.
    """
    folder = ModelFolder.open(model)
    if size is not None:
        folder.latent_shape(size)
    folder.count_steps(steps)
    return folder.with_loras(loras)


@dataclass(frozen=True)
class SamplerOptions:
    """How a model is held while it makes pictures, and where.

    Attributes:
        memory: of the transformers' weights (`runtime/devices.py`).
        tiny_decoder: an `AutoencoderTiny` in the VAE's place: a folder, `zoo:NAME` or a hub id.
        prompt_cache: a folder in which encoded prompts outlive the process.
        device: where it computes, as `pick_device` knows it.
    """

    memory: Memory = "plain"
    tiny_decoder: str | None = None
    prompt_cache: Path | None = None
    device: torch.device | str = "cpu"

    def load(self, folder: ModelFolder, prompts: Sequence[str]) -> Sampler:
        """The model, its prompts encoded already and its text encoder gone again."""
        from twostep.inference.sampler import Sampler

        placement = Placement.on(pick_device(str(self.device), option="--device"), self.memory)
        encoder = folder.encoder(
            placement, cache_size=_ENCODED_FIRST, prompt_cache=self.prompt_cache
        )
        if len(prompts) <= _ENCODED_FIRST:
            encoder.encode(prompts)
            encoder.release()
        return Sampler.load(
            folder, placement=placement, tiny_decoder=self.tiny_decoder, encoder=encoder
        )


@dataclass(frozen=True)
class PictureRequest:
    """Which pictures are wanted: `count` of each prompt, seeds from `seed` up.

    Attributes:
        model: a folder, `zoo:NAME` or a hub id.
        steps: a teacher's; None for its 8, and for a student.
        size: (height, width) in pixels; None: the one that the model was made for.
        preview: also what step 1 points to; for students only.
        batch_size: pictures at a time.
        loras: LoRA files on the model.
    """

    model: str
    prompts: Sequence[str]
    seed: int = 0
    steps: int | None = None
    size: tuple[int, int] | None = None
    count: int = 1
    preview: bool = False
    batch_size: int = 16
    options: SamplerOptions = SamplerOptions()
    loras: Sequence[LoraFile] = ()


@dataclass(frozen=True)
class Prepared:
    """Pictures that can be made: every argument was checked, and no weights are read yet.

    Attributes:
        pictures: all that are wanted, in their order.
        missing: those of them that are not there.
    """

    request: PictureRequest
    folder: ModelFolder
    facts: Mapping[Picture, dict[str, str]]
    missing: frozenset[Picture]

    @property
    def pictures(self) -> list[Picture]:
        return list(self.facts)

    def make(self) -> Iterator[Picture]:
        """Writes what is missing and yields all pictures, as they are done."""
        request, sampler = self.request, None
        if self.missing:
            prompts = [p.prompt for p in self.pictures if p in self.missing]
            sampler = request.options.load(self.folder, list(dict.fromkeys(prompts)))
        for start in range(0, len(self.pictures), request.batch_size):
            part = self.pictures[start : start + request.batch_size]
            todo = [picture for picture in part if picture in self.missing]
            if todo:
                assert sampler is not None
                _make(todo, sampler, request, self.facts)
            for picture in part:
                yield replace(picture, made=picture in self.missing)


def prepare(request: PictureRequest, out: Path) -> Prepared:
    """Checks everything but the weights, and finds out which pictures `out` lacks.

    A picture that is already there, made by the same weights held in the same way from the same
    prompt, seed, size and number of steps, is not made again. Needs no torch.

    Raises:
        InputError, ModelError: for what cannot be made.
    """
    check_prompts(request.prompts)
    check_seeds(request.seed, request.count)
    folder = open_model(request.model, size=request.size, steps=request.steps, loras=request.loras)
    if request.preview:
        folder.check_student("preview")
    if request.size is None:
        request = replace(request, size=folder.sizes[0])
    if str(request.options.device) not in ("auto", "cpu"):
        pick_device(str(request.options.device), option="--device")
    if request.options.tiny_decoder is not None:
        tiny_folder(request.options.tiny_decoder)
    named = _pictures(request, folder.count_steps(request.steps), out)
    make_folder(out)
    sweep(out)
    weights = folder.fingerprint[:16]
    facts = {}
    for picture in named:
        told = _facts(picture, request, weights)
        facts[_beside_others(picture, told)] = told
    missing = frozenset(picture for picture, told in facts.items() if not _is_there(picture, told))
    return Prepared(request, folder, facts, missing)


def generate(request: PictureRequest, out: Path) -> Iterator[Picture]:
    """`prepare`, and then `Prepared.make`.

    Raises:
        InputError, ModelError: before any picture is made.
    """
    yield from prepare(request, out).make()


def _pictures(request: PictureRequest, steps: int, out: Path) -> list[Picture]:
    """All that are wanted, as if they were there."""
    found = [
        Picture(
            path=path,
            prompt=prompt,
            seed=number,
            steps=steps,
            model=request.model,
            preview=_beside(path) if request.preview else None,
            made=True,
        )
        for prompt in dict.fromkeys(request.prompts)
        for number in range(request.seed, request.seed + request.count)
        for path in [out / f"{_slug(prompt)}-{number}-{steps}steps.png"]
    ]
    owners: dict[str, str] = {}
    for picture in found:
        other = owners.setdefault(picture.path.name, picture.prompt)
        if other != picture.prompt:
            raise InputError(
                f"prompt: {picture.prompt[:200]!r} and {other[:200]!r} would share the file "
                f"{picture.path.name}; generate them into two folders"
            )
    return found


def _make(
    pictures: Sequence[Picture],
    sampler: Sampler,
    request: PictureRequest,
    facts: Mapping[Picture, dict[str, str]],
) -> None:
    from twostep.inference.sampler import check_pictures
    from twostep.method.rollout import seeded_noise
    from twostep.runtime.images import to_pil

    assert request.size is not None
    noise = seeded_noise([p.seed for p in pictures], sampler.noise_shape(*request.size))
    sample = sampler.sample([p.prompt for p in pictures], noise, request.steps)
    prompts = [p.prompt for p in pictures]
    images = check_pictures(sampler.decoder.decode(sample.latents), prompts)
    for picture, image in zip(pictures, images, strict=True):
        _save(to_pil(image), picture.path, facts[picture])
    if pictures[0].preview is not None:
        assert sample.preview is not None
        for picture, image in zip(pictures, sampler.decoder.decode(sample.preview), strict=True):
            _save(to_pil(image), _beside(picture.path), facts[picture])


def save_grid(pictures: Sequence[Picture], path: Path) -> Path:
    """One picture of all: a row for each prompt, previews in a row above their results."""
    rows: dict[tuple[str, bool], list[Image.Image]] = {}
    for picture in pictures:
        if picture.preview is not None:
            rows.setdefault((picture.prompt, True), []).append(_open(picture.preview))
        rows.setdefault((picture.prompt, False), []).append(_open(picture.path))
    from twostep.runtime.images import tile

    sheet = tile(list(rows.values()))
    write_atomically(path, lambda p: sheet.save(p, format="PNG"))
    return path


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _facts(picture: Picture, request: PictureRequest, weights: str) -> dict[str, str]:
    """What the file says of itself; a picture with other facts is another picture."""
    assert request.size is not None
    (height, width), options = request.size, request.options
    facts = {
        # Not `prompt`: ComfyUI would read it as JSON, and stop at it.
        "Description": picture.prompt,
        "seed": str(picture.seed),
        "steps": str(picture.steps),
        "model": _public_name(picture.model),
        "size": f"{width}x{height}",
        "weights": weights,
    }
    if options.memory in ("int8", "fp8"):
        facts["memory"] = options.memory
    if options.tiny_decoder is not None:
        facts["decoder"] = _public_name(options.tiny_decoder)
    from twostep.inference.parameters import parameters_text

    facts["parameters"] = parameters_text(
        picture.prompt, seed=picture.seed, steps=picture.steps, size=request.size,
        model=facts["model"], weights=weights, loras=request.loras,
    )  # fmt: skip
    return facts


def _public_name(model: str) -> str:
    """A model's name for a file that may be passed on: without the folders of this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _beside_others(picture: Picture, facts: Mapping[str, str]) -> Picture:
    """The picture, under a name with a checksum of its facts where another one has its name.

    Another model's, size's or decoder's picture is never overwritten, nor one of anybody else.
    """
    paths = [picture.path] if picture.preview is None else [picture.path, picture.preview]
    if all(_read_facts(path) in (None, facts) for path in paths):
        return picture
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    path = picture.path.with_name(f"{picture.path.stem}-{digest}.png")
    return replace(picture, path=path, preview=None if picture.preview is None else _beside(path))


def _is_there(picture: Picture, facts: dict[str, str]) -> bool:
    paths = [picture.path] if picture.preview is None else [picture.path, picture.preview]
    return all(_read_facts(path) == facts for path in paths)


def _read_facts(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            facts = {str(key): str(value) for key, value in image.info.items()}
            image.verify()  # the checksum that a PNG has of each of its chunks
            return facts
    except (OSError, SyntaxError, ValueError):  # torn or no picture: made again
        return None


def _save(image: Image.Image, path: Path, facts: dict[str, str]) -> None:
    info = PngInfo()
    for key, value in facts.items():
        # As those write it who read `parameters`: Latin text plain.
        (info.add_text if key == "parameters" else info.add_itxt)(key, value)
    write_atomically(path, lambda p: image.save(p, format="PNG", pnginfo=info))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-preview.png")


def _is_a_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _slug(prompt: str) -> str:
    """A file name from a prompt; word characters of any script are kept.

    Long prompts and other characters are lost; 64 bits of a checksum tell such prompts apart.
    """
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60] or "picture"
    # File systems count bytes; some hold 255 of them, with seed, steps and a suffix.
    words = words.encode("utf-8", "replace")[:160].decode("utf-8", "ignore")
    if not _is_a_name(words):  # a locale without such characters
        words = re.sub(r"[^A-Za-z0-9-]+", "", words) or "picture"
    if words.replace("-", " ") == prompt:
        return words
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{words}-{digest[:16]}"
