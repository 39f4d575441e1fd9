"""Models side by side: the same prompts, the same noise, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twostep.errors import InputError
from twostep.inference.generate import check_prompts, check_seeds, open_model
from twostep.models.folder import ModelFolder
from twostep.runtime.devices import pick_device
from twostep.runtime.files import make_folder, write_atomically
from twostep.runtime.progress import progress_bar

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class _Row:
    """A model's row, opened and checked; no weights yet."""

    name: str
    folder: ModelFolder
    steps: int | None

    @property
    def label(self) -> str:
        used = self.folder.count_steps(self.steps)
        return f"{self.name}, {used} step{'s' if used > 1 else ''}"


def compare(
    models: Sequence[tuple[str, int | None]],
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    count: int = 1,
    size: tuple[int, int] | None = None,
    preview: bool = False,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes one picture: a column per prompt and seed, a row per model at equal noise.

    Args:
        models: each a folder, `zoo:NAME` or hub id, and its steps; None for a teacher's 8.
        seed, count: seeds of each prompt, `seed` and up.
        size: (height, width) in pixels; None: what the first student was made for, or the first
            model.
        preview: a row more for each student, of what its step 1 points to.

    Raises:
        InputError, ModelError: for what cannot be used, before any weights are read.
    """
    check_prompts(prompts)
    check_seeds(seed, count)
    if out.suffix != ".png":
        raise InputError(f"out: expected a .png file, got {out}")
    rows = [
        _Row(name, open_model(model, size=size, steps=steps), steps)
        for name, (model, steps) in zip(_names(models), models, strict=True)
    ]
    labels = [row.label for row in rows]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"model: two rows would be called {twice!r}")
    students = [row.folder for row in rows if row.folder.student is not None]
    if preview and not students:
        raise InputError("preview: none of the models is a two-step student")
    size = size or (students or [row.folder for row in rows])[0].sizes[0]
    for row in rows:
        row.folder.latent_shape(size)
    pairs = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    with progress_bar("compare", len(rows)) as advance:
        drawn = _draw(
            rows, pairs, size=size, preview=preview,
            device=pick_device(str(device), option="--device"), advance=advance,
        )  # fmt: skip
    from twostep.runtime.images import labelled_rows

    picture = labelled_rows(drawn)
    make_folder(out.parent)
    write_atomically(out, lambda path: picture.save(path, format="PNG"))
    return out


def _names(models: Sequence[tuple[str, int | None]]) -> list[str]:
    """Each model's folder, with the one above it where two would be called the same."""
    paths = [Path(model.removeprefix("zoo:")) for model, _ in models]
    names = []
    for path, (model, _) in zip(paths, models, strict=True):
        others = {m for p, (m, _) in zip(paths, models, strict=True) if p.name == path.name}
        above = path.parent.name if len(others - {model}) else ""
        names.append(f"{above}/{path.name}" if above else path.name)
    return names


def _draw(
    rows: Sequence[_Row],
    pairs: Sequence[tuple[str, int]],
    *,
    size: tuple[int, int],
    preview: bool,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, list[Image.Image]]:
    """Pictures of each (prompt, seed), by the label of their row."""
    from twostep.inference.sampler import Sampler, check_pictures
    from twostep.method.rollout import seeded_noise
    from twostep.runtime.images import to_pil

    captions = [prompt for prompt, _ in pairs]
    drawn: dict[str, list[Image.Image]] = {}
    for row in rows:
        sampler = Sampler.load(row.folder, device)
        noise = seeded_noise([number for _, number in pairs], sampler.noise_shape(*size))
        sample = sampler.sample(captions, noise, row.steps)
        if preview and sample.preview is not None:
            images = sampler.decoder.decode(sample.preview)
            drawn[f"{row.name}, preview after step 1"] = [to_pil(image) for image in images]
        images = check_pictures(sampler.decoder.decode(sample.latents), captions)
        drawn[row.label] = [to_pil(image) for image in images]
        advance(1)
    return drawn
