"""Models side by side: the same prompts, the same noise, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from twostep.errors import InputError
from twostep.inference.generate import check_prompts, check_seeds, open_model
from twostep.inference.sampler import Sampler, check_pictures
from twostep.method.rollout import seeded_noise
from twostep.runtime.files import make_folder, write_atomically
from twostep.runtime.images import labelled_rows, to_pil


def compare(
    models: Sequence[tuple[str, int | None]],
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    count: int = 1,
    size: tuple[int, int] = (64, 64),
    preview: bool = False,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes one picture: a column per prompt and seed, a row per model at equal noise.

    Args:
        models: each a folder, `zoo:NAME` or hub id, and its steps; None for a teacher's 8.
        seed, count: seeds of each prompt, `seed` and up.
        preview: a row more for each student, of what its step 1 points to.

    Raises:
        InputError, ModelError: for what cannot be used.
    """
    check_prompts(prompts)
    check_seeds(seed, count)
    if out.suffix != ".png":
        raise InputError(f"out: expected a .png file, got {out}")
    pairs = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    captions = [prompt for prompt, _ in pairs]
    rows: dict[str, list[Image.Image]] = {}
    for model, steps in models:
        folder = open_model(model, size=size, steps=steps)
        sampler = Sampler.load(folder, device)
        noise = seeded_noise([number for _, number in pairs], sampler.noise_shape(*size))
        sample = sampler.sample(captions, noise, steps)
        name = Path(model.removeprefix("zoo:")).name
        used = folder.count_steps(steps)
        if preview and sample.preview is not None:
            images = sampler.decoder.decode(sample.preview)
            rows[f"{name}, preview after step 1"] = [to_pil(image) for image in images]
        images = check_pictures(sampler.decoder.decode(sample.latents), captions)
        label = f"{name}, {used} step{'s' if used > 1 else ''}"
        if label in rows:
            raise InputError(f"model: two rows would be called {label!r}")
        rows[label] = [to_pil(image) for image in images]
    picture = labelled_rows(rows)
    make_folder(out.parent)
    write_atomically(out, lambda path: picture.save(path, format="PNG"))
    return out
