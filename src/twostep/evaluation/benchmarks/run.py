"""A benchmark from end to end: prompts, pictures of every model, their folders, the scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from twostep.evaluation.benchmarks.fetching import digest, fetch
from twostep.evaluation.benchmarks.layouts import Item
from twostep.evaluation.benchmarks.official_scorer import OfficialScorer
from twostep.evaluation.benchmarks.presets import Preset, read_items
from twostep.evaluation.entries import Entry
from twostep.evaluation.evaluate import make_all
from twostep.evaluation.image_store import PART, ImageStore
from twostep.evaluation.picture_index import PictureIndex, write_index
from twostep.evaluation.prompts import PromptSet
from twostep.inference.generate import SamplerOptions
from twostep.runtime.files import make_folder, new_folder, write_json
from twostep.runtime.processes import Share, end_beats, wait_for
from twostep.runtime.progress import progress_bar
from twostep.runtime.provenance import stamp


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest:
    """Who is put to which benchmark.

    Attributes:
        first: prompts, to try it; None for all, which alone compare with published figures.
        size: (height, width) in pixels.
        scorer: the official one, run for each model; None to run it later.
    """

    preset: Preset
    entries: Sequence[Entry]
    size: tuple[int, int]
    seed: int = 0
    first: int | None = None
    scorer: OfficialScorer | None = None
    options: SamplerOptions = field(default_factory=SamplerOptions)


def run_benchmark(request: BenchmarkRequest, out: Path) -> dict[str, Any] | None:
    """Makes the pictures under `out/images` and the scorer's folders under `out/NAME`; resumable.

    Under torchrun every process makes its share; the first one does the rest, the others return
    None.

    Returns:
        what is written to `out/NAME/benchmark.json`.

    Raises:
        InputError, ModelError: before any picture is made.
    """
    preset, folder = request.preset, out / "images"
    for entry in request.entries:
        opened = entry.open()
        opened.latent_shape(request.size)
        opened.count_steps(entry.steps)
    place = out / preset.name
    files = fetch(preset.source, place / "prompts")
    items = read_items(preset, files)[: request.first]
    prompts = PromptSet(
        list(dict.fromkeys(item.prompt for item in items)), None, preset.seeds, request.seed
    )
    make_folder(folder)
    memory = request.options.memory
    stores = [
        ImageStore(folder / e.key, e, prompts=prompts, size=request.size, memory=memory)
        for e in request.entries
    ]
    share = Share.here()
    make_all(stores, request.options, share=share)
    if not share.is_first:
        return None
    wait_for(
        lambda: not any(s.missing() for s in stores), share,
        what=lambda: f"{sum(len(s.missing()) for s in stores)} files of images are missing",
        folder=folder,
    )  # fmt: skip
    end_beats(folder)
    write_index(folder, stores, PART)
    models = {entry.key: _one_model(request, entry, items, out=out) for entry in request.entries}
    result = {
        "benchmark": preset.title,
        "licence": preset.licence,
        "home": preset.home,
        "prompts": len(items),
        "prompts_sha256": digest(files),
        "complete": request.first is None,
        "seeds": preset.seeds,
        "size": list(request.size),
        "models": models,
        "published": dict(preset.published),
        **stamp(),
    }
    write_json(place / "benchmark.json", result)
    return result


def _one_model(
    request: BenchmarkRequest, entry: Entry, items: Sequence[Item], *, out: Path
) -> dict[str, Any]:
    """Its folder for the scorer, made anew, and what the scorer said of it."""
    preset, place = request.preset, out / request.preset.name
    # The scorer takes everything in the folder for pictures: nothing else may lie there.
    pictures = place / "pictures" / entry.key
    index = PictureIndex.read(out)
    with new_folder(pictures) as folder:
        title = f"{preset.title}'s folder of {entry.key}"
        with progress_bar(title, len(items), unit="prompts") as advance:
            for item in items:
                named = replace(item, place=item.place.format(model=entry.key))
                made = list(_pictures_of(index, entry.key, item.prompt, preset.seeds))
                preset.layout(made, folder / named.place, named)
                advance(1)
    result: dict[str, Any] = {"steps": entry.steps or 2, "folder": str(pictures.relative_to(out))}
    if request.scorer is None:
        return result
    results = place / "results" / entry.key
    make_folder(results)
    places = {
        "images": pictures.resolve(),
        "model": entry.key,
        "results": results.resolve(),
        "prompts": (place / "prompts" / preset.source.name).resolve(),
        "width": request.size[1],
        "height": request.size[0],
    }
    return result | request.scorer.run(places, place / f"{entry.key}.log", preset.figure)


def _pictures_of(index: PictureIndex, key: str, prompt: str, seeds: int) -> Iterator[Image.Image]:
    row = index.prompts.index(prompt)
    for number in range(seeds):
        pixels = index.picture(key, row + number * len(index.prompts))
        yield Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def as_text(result: dict[str, Any]) -> str:
    """The scores beside the published figures, in lines."""
    lines = [
        f"{result['benchmark']}: {result['prompts']} prompts, {result['seeds']} pictures of each; "
        f"licence of the prompts: {result['licence']}"
    ]
    for key, found in result["models"].items():
        if "score" in found:
            lines.append(f"{key}: {found['score']:g}")
        elif "code" in found:
            lines.append(f"{key}: the scorer ended with {found['code']}, see {found['log']}")
            lines += [f"    {line}" for line in found["said"]]
        else:
            lines.append(f"{key}: {found['folder']}, for the scorer of {result['home']}")
    if not result["complete"]:
        lines.append("not all of the prompts: no score to compare with published ones")
    lines += [f"published, {name}: {text}" for name, text in result["published"].items()]
    return "\n".join(lines)
