"""A model's images on disk, as 8-bit pixels: made once, resumable, shared by processes.

A set is a folder with one `part-00000.safetensors` for every `PART` images: `images` and, for a
student, `previews` (what step 1 points to), uint8 (B, 3, H, W). The file's metadata says what it
was made with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twostep.evaluation.entries import Entry
from twostep.evaluation.prompts import PromptSet
from twostep.inference.sampler import Sampler, check_pictures
from twostep.runtime.checked_tensors import DamagedError, load_checked, save_checked
from twostep.runtime.devices import Memory
from twostep.runtime.files import make_folder, write_atomically
from twostep.runtime.images import to_bytes
from twostep.runtime.notices import notice
from twostep.runtime.processes import ALONE, Share

PART = 64


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W) in -1..1, and a student's step-1 previews."""

    images: Tensor
    previews: Tensor | None


class ImageStore:
    """One entry's folder of parts.

    Args:
        size: (height, width) in pixels.
        memory: how the model's weights are held.
    """

    def __init__(
        self,
        folder: Path,
        entry: Entry,
        *,
        prompts: PromptSet,
        size: tuple[int, int],
        memory: Memory = "plain",
    ) -> None:
        self.folder, self.entry, self.prompts, self.size = folder, entry, prompts, size
        weights = entry.open().fingerprint
        settings: list[Any] = [entry.steps, entry.guidance_scale, entry.reference, *size]
        if memory in ("int8", "fp8"):  # others give the same pictures
            settings.append(memory)
        if entry.sigmas is not None:
            settings.append(entry.sigmas)
        text = json.dumps([weights, settings, prompts.fingerprint, PART])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    @property
    def parts(self) -> list[slice]:
        """The images of each part."""
        total = len(self.prompts)
        return [slice(i, min(i + PART, total)) for i in range(0, total, PART)]

    def missing(self, share: Share = ALONE, *, whole: bool = False) -> list[int]:
        """Parts of `share` that are still to be made.

        Args:
            whole: read them from end to end for their checksums.
        """
        return [i for i in share.of(range(len(self.parts))) if not self._is_there(i, whole)]

    def make(self, sampler: Sampler, part: int) -> None:
        """Makes one part."""
        rows = self.parts[part]
        noise = self.prompts.noise(rows, sampler.noise_shape(*self.size), self.entry.reference)
        sample = sampler.sample(
            self.prompts.captions[rows],
            noise,
            self.entry.steps,
            guidance_scale=self.entry.guidance_scale,
            sigmas=self.entry.sigmas,
        )
        images = check_pictures(sampler.decoder.decode(sample.latents), self.prompts.captions[rows])
        tensors = {"images": to_bytes(images)}
        if sample.preview is not None:
            tensors["previews"] = to_bytes(sampler.decoder.decode(sample.preview))
        make_folder(self.folder)
        metadata = {"fingerprint": self.fingerprint}
        write_atomically(self._path(part), lambda p: save_checked(tensors, p, metadata))

    @property
    def has_previews(self) -> bool:
        """Whether the parts, which must be there, hold a student's previews."""
        with safe_open(self._path(0), "pt") as file:
            return "previews" in file.keys()  # noqa: SIM118 (safe_open is no mapping)

    def read(self) -> ImageSet:
        """All the images, once no part is missing.

        Raises:
            DamagedError: if a part was changed or removed meanwhile.
        """
        images, previews = [], []
        for part in range(len(self.parts)):
            try:
                tensors, _ = load_checked(self._path(part))
                images.append(tensors["images"])
            except (OSError, KeyError) as error:
                raise DamagedError(
                    f"{self._path(part)} was changed or removed meanwhile. Run it again"
                ) from error
            if "previews" in tensors:
                previews.append(tensors["previews"])
        return ImageSet(
            _to_floats(torch.cat(images)), _to_floats(torch.cat(previews)) if previews else None
        )

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def _is_there(self, part: int, whole: bool) -> bool:
        path = self._path(part)
        if not path.is_file():
            return False
        try:
            if not whole:
                with safe_open(path, "pt") as file:
                    return (file.metadata() or {}).get("fingerprint") == self.fingerprint
            tensors, metadata = load_checked(path)
        except (DamagedError, SafetensorError, OSError) as error:
            if whole:
                notice(f"{error}; its images are made anew")
            return False
        return metadata.get("fingerprint") == self.fingerprint and self._fits(tensors, part)

    def _fits(self, tensors: Mapping[str, Tensor], part: int) -> bool:
        """Whether they are this part's images."""
        rows = self.parts[part]
        wanted = (rows.stop - rows.start, 3, *self.size)
        found = [tensors.get("images"), tensors.get("previews", tensors.get("images"))]
        return all(t is not None and (t.shape, t.dtype) == (wanted, torch.uint8) for t in found)


def make_images(
    store: ImageStore,
    load: Callable[[], Sampler],
    *,
    share: Share = ALONE,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Makes what is missing of `store`; `load` is called only if something is.

    Args:
        on_images: told how many images each part (or found part) added.
    """
    missing = store.missing(share, whole=True)
    sampler = load() if missing else None
    for part in share.of(range(len(store.parts))):
        rows = store.parts[part]
        if sampler is not None and part in missing:
            store.make(sampler, part)
        if on_images:
            on_images(rows.stop - rows.start)


def _to_floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
