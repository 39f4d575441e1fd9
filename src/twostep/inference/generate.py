"""Pictures from prompts, as PNG files that say how they were made."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.data.prompts import load_prompts
from twostep.errors import InputError
from twostep.families.family import MAX_PIXELS
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.runtime.devices import MODES, Memory, Placement, pick_device
from twostep.runtime.files import write_atomically
from twostep.runtime.images import tile, to_pil

# Prompts that are encoded before the transformers are loaded, and remembered.
_ENCODED_FIRST = 512


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "SIDE" or "WIDTHxHEIGHT".

    Raises:
        InputError: for anything else, or more than `MAX_PIXELS`.
    """
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise InputError(f"size: expected SIDE or WIDTHxHEIGHT in pixels, got {text!r}")
    width = int(match[1])
    height = int(match[2] or width)
    if width * height > MAX_PIXELS:
        raise InputError(f"size: at most {MAX_PIXELS} pixels, {text!r} has {width * height}")
    return height, width


def read_prompts(prompts: Sequence[str], file: str | None = None) -> list[str]:
    """Prompts given one by one, `-` standing for stdin's lines, then those of `file`.

    Raises:
        InputError, PromptError: for an unreadable file, or no prompts at all.
    """
    found: list[str] = []
    for prompt in prompts:
        lines = [line.strip() for line in sys.stdin] if prompt == "-" else [prompt]
        found.extend(line for line in lines if line or prompt != "-")
    if file is not None:
        found.extend(load_prompts(file))
    if not found:
        raise InputError("prompts: none given; name some, or --prompts FILE, or - for stdin")
    return found


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises InputError if there is none, or one is empty."""
    if not prompts or not all(p.strip() for p in prompts):
        raise InputError("prompt: must not be empty")


@dataclass(frozen=True)
class Picture:
    """A picture on disk.

    Attributes:
        path: a function of prompt, seed and steps.
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
        return json.dumps(record, ensure_ascii=False)


def open_model(model: str, size: tuple[int, int], steps: int | None) -> ModelFolder:
    """The model's folder, once the arguments fit it; loads no weights.

    Raises:
        InputError, ModelError: for what does not fit.
    """
    folder = ModelFolder.open(model)
    folder.latent_shape(size)
    folder.count_steps(steps)
    return folder


@dataclass(frozen=True)
class Holding:
    """How a model is held while it makes pictures.

    Attributes:
        memory: of the transformers' weights (`memory.py`).
        tiny_decoder: an `AutoencoderTiny` in the VAE's place: a folder, `zoo:NAME` or a hub id.
        prompt_cache: a folder in which encoded prompts outlive the process.
    """

    memory: Memory = "plain"
    tiny_decoder: str | None = None
    prompt_cache: Path | None = None

    @staticmethod
    def of(memory: str, tiny_decoder: str | None, prompt_cache: Path | None) -> Holding:
        """From names; InputError for a `memory` that is not known."""
        for mode in MODES:
            if memory == mode:
                return Holding(mode, tiny_decoder, prompt_cache)
        raise InputError(f"memory: expected one of {', '.join(MODES)}, got {memory!r}")

    def load(self, folder: ModelFolder, prompts: Sequence[str], device: torch.device) -> Sampler:
        """The model, its prompts encoded already and its text encoder gone again."""
        placement = Placement.on(device, self.memory)
        encoder = folder.encoder(
            placement, cache_size=_ENCODED_FIRST, prompt_cache=self.prompt_cache
        )
        if len(prompts) <= _ENCODED_FIRST:
            encoder.encode(prompts)
            encoder.release()
        return Sampler.load(
            folder, placement=placement, tiny_decoder=self.tiny_decoder, encoder=encoder
        )


def generate(
    prompts: Sequence[str],
    model: str,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    size: tuple[int, int] = (64, 64),
    count: int = 1,
    preview: bool = False,
    batch_size: int = 16,
    device: str = "cpu",
    holding: Holding = Holding(),
) -> Iterator[Picture]:
    """Writes `count` pictures per prompt, seeds from `seed` up, and yields them as they are done.

    A picture that is already there, made by the same weights held in the same way from the same
    prompt, seed, size and number of steps, is not made again. Where none is missing, no weights
    are read.

    Args:
        size: (height, width) in pixels.
        preview: also write what step 1 points to; for students only.

    Raises:
        InputError, ModelError: before any picture is made.
    """
    check_prompts(prompts)
    folder = open_model(model, size, steps)
    if preview:
        folder.check_student("preview")
    chosen = pick_device(device)
    used = folder.count_steps(steps)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        Picture(path, prompt, number, used, model, _beside(path) if preview else None, True)
        for prompt in dict.fromkeys(prompts)
        for number in range(seed, seed + count)
        for path in [out / f"{_slug(prompt)}-{number}-{used}steps.png"]
    ]
    weights = folder.fingerprint[:16]
    facts = {picture: _facts(picture, size, weights, holding) for picture in wanted}
    missing = {picture for picture in wanted if not _is_there(picture, facts[picture])}
    sampler = None
    if missing:
        sampler = holding.load(folder, list(dict.fromkeys(p.prompt for p in missing)), chosen)
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        todo = [picture for picture in part if picture in missing]
        if todo:
            assert sampler is not None
            _make(todo, sampler, size, steps, facts)
        for picture in part:
            yield replace(picture, made=picture in missing)


def _make(
    pictures: Sequence[Picture],
    sampler: Sampler,
    size: tuple[int, int],
    steps: int | None,
    facts: Mapping[Picture, dict[str, str]],
) -> None:
    noise = seeded_noise([p.seed for p in pictures], sampler.noise_shape(*size))
    sample = sampler.sample([p.prompt for p in pictures], noise, steps)
    for picture, image in zip(pictures, sampler.decoder.decode(sample.latents), strict=True):
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
    sheet = tile(list(rows.values()))
    write_atomically(path, lambda p: sheet.save(p, format="PNG"))
    return path


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _facts(
    picture: Picture, size: tuple[int, int], weights: str, holding: Holding
) -> dict[str, str]:
    facts = {
        "prompt": picture.prompt,
        "seed": str(picture.seed),
        "steps": str(picture.steps),
        "model": picture.model,
        "size": f"{size[1]}x{size[0]}",
        "weights": weights,
    }
    if holding.memory == "int8":
        facts["memory"] = holding.memory
    if holding.tiny_decoder is not None:
        facts["decoder"] = holding.tiny_decoder
    return facts


def _is_there(picture: Picture, facts: dict[str, str]) -> bool:
    paths = [picture.path] if picture.preview is None else [picture.path, picture.preview]
    return all(_read_facts(path) == facts for path in paths)


def _read_facts(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return {str(key): str(value) for key, value in image.info.items()}
    except OSError:  # torn or no picture: made again
        return None


def _save(image: Image.Image, path: Path, facts: dict[str, str]) -> None:
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    write_atomically(path, lambda p: image.save(p, format="PNG", pnginfo=info))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-preview.png")


def _slug(prompt: str) -> str:
    """A file name from a prompt; word characters of any script are kept.

    Long prompts and other characters are lost; a few digits of a checksum tell such prompts apart.
    """
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60] or "picture"
    if words.replace("-", " ") == prompt:
        return words
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
