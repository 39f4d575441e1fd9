"""Which pictures an evaluation left on disk: models, prompts, seeds; and single pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from twostep.errors import InputError
from twostep.evaluation.image_store import ImageStore
from twostep.runtime.files import write_json

_NAME = "index.json"


@dataclass(frozen=True)
class PictureSet:
    """One model's pictures, or a student's previews.

    Attributes:
        key: as in `metrics.json`, such as `student_2` or `student_2/preview`; `reference` for the
            teacher's second set.
        label: for people.
        folder: beside the index.
        tensor: which of the two that a part holds.
        fingerprint: of weights, settings and prompts; other pictures have another.
    """

    key: str
    label: str
    kind: str
    folder: str
    tensor: Literal["images", "previews"]
    fingerprint: str


@dataclass(frozen=True)
class PictureIndex:
    """What lies in an evaluation's `images` folder.

    Attributes:
        prompts: P of them; row `s * P + p` of every set is the s-th picture of prompt p.
        seeds: of the noise of each row; the reference has others.
        part: pictures in a file.
        sets: by key.
    """

    folder: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    part: int
    sets: dict[str, PictureSet]

    @staticmethod
    def read(run: Path) -> PictureIndex:
        """The index of `run`, the folder that `twostep evaluate` was given as `--out`.

        Raises:
            InputError: if there is none.
        """
        folder = run / "images"
        try:
            found = json.loads((folder / _NAME).read_text(encoding="utf-8"))
            sets = {item["key"]: PictureSet(**item) for item in found["sets"]}
            return PictureIndex(
                folder, found["prompts"], found["seeds"], part=found["part"], sets=sets
            )
        except FileNotFoundError:
            raise InputError(
                f"RUN: {run} has no images/{_NAME}, expected the --out of `twostep evaluate`, "
                "which writes it (an older one: evaluate again, pictures that are there are kept)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"RUN: {folder / _NAME} cannot be read: {error}") from error

    def __len__(self) -> int:
        """Pictures in a set."""
        return len(self.seeds)

    def prompt(self, row: int) -> str:
        return self.prompts[row % len(self.prompts)]

    def picture(self, key: str, row: int) -> Tensor:
        """uint8 (3, H, W).

        Raises:
            InputError: if the file is gone, damaged, or of another evaluation.
        """
        chosen = self.sets[key]
        path = self.folder / chosen.folder / f"part-{row // self.part:05d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                made = (file.metadata() or {}).get("fingerprint")
                pixels: Tensor = file.get_slice(chosen.tensor)[row % self.part]
        except (SafetensorError, OSError) as error:
            raise InputError(f"RUN: {path} cannot be read: {error}") from error
        if made != chosen.fingerprint:
            raise InputError(f"RUN: {path} is of another evaluation than its index; evaluate again")
        return pixels


def write_index(folder: Path, stores: Sequence[ImageStore], part: int) -> None:
    """Writes what `stores`, all made, hold into `folder/index.json`.

    Args:
        part: pictures in a file.
    """
    prompts = stores[0].prompts
    sets = [asdict(each) for store in stores for each in _sets(store, folder)]
    content: dict[str, Any] = {
        "prompts": prompts.prompts,
        "seeds": prompts.noise_seeds(),
        "part": part,
        "sets": sets,
    }
    write_json(folder / _NAME, content)


def _sets(store: ImageStore, folder: Path) -> Iterable[PictureSet]:
    entry, place = store.entry, str(store.folder.relative_to(folder))
    label = f"{entry.label}, other noise" if entry.reference else entry.label
    images = PictureSet(
        key=entry.key, label=label, kind=entry.kind, folder=place, tensor="images",
        fingerprint=store.fingerprint,
    )  # fmt: skip
    yield images
    if store.has_previews:
        preview = entry.as_preview()
        yield replace(images, key=preview.key, label=preview.label, tensor="previews")
