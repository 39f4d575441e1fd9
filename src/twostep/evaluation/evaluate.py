"""Compares students with their teacher on the same prompts and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twostep.evaluation.entries import Entry, check_size
from twostep.evaluation.features import Extractor, load_extractor
from twostep.evaluation.figures import AlignedSets, Measured, figures, intervals, nested
from twostep.evaluation.image_store import PART, ImageStore, make_images
from twostep.evaluation.latency import measure_latency
from twostep.evaluation.picture_index import write_index
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.page import write_report
from twostep.evaluation.report.pictures import PictureGroup
from twostep.evaluation.report.votes import read_votes
from twostep.evaluation.report.words import verdict
from twostep.evaluation.scorers import Scorer, check_scorer, load_scorer
from twostep.evaluation.worst import worst_pictures
from twostep.inference.generate import SamplerOptions
from twostep.inference.sampler import Sampler
from twostep.runtime.files import make_folder, sweep, write_json
from twostep.runtime.images import pictures_at_once
from twostep.runtime.processes import Share, beat, end_beats, wait_for
from twostep.runtime.progress import progress_bar, working
from twostep.runtime.provenance import stamp

# How many columns the report's pictures have.
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Who is compared on what, and how finely.

    Attributes:
        entries: the first is the teacher; `naive` among them gives the gap that students close.
        features: extractors' names; the first gives the main figures.
        scores: scorers' names.
        halves: random halves of the prompts behind each interval; 0 for no intervals.
        size: (height, width) in pixels.
        timed: images in the batch that is timed, fewer where they are large; 0 for no timing.
        options: how every model is held, and where.
    """

    entries: Sequence[Entry]
    prompts: PromptSet
    features: Sequence[str] = ("inspector",)
    scores: Sequence[str] = ("inspector",)
    halves: int = 100
    size: tuple[int, int]
    timed: int = 32
    options: SamplerOptions = field(default_factory=SamplerOptions)

    @property
    def teacher(self) -> Entry:
        return self.entries[0]


@dataclass(frozen=True)
class Comparison:
    """What an evaluation found.

    Attributes:
        figures: as in `metrics.json`.
        panels: the first pictures of each row, (K, 3, H, W), by label.
        captions: K prompts.
        seeds: K, of the noise.
        groups: the first student's worst pictures, by figure.
    """

    figures: dict[str, Any]
    panels: dict[str, Tensor]
    captions: list[str]
    seeds: list[int]
    groups: list[PictureGroup]

    @property
    def verdict(self) -> str:
        """What the figures come to, in a sentence per student."""
        return verdict(self.figures)

    def write(
        self,
        path: Path,
        facts: Mapping[str, Any],
        *,
        curves: Sequence[dict[str, Any]] = (),
        title: str = "Two steps against their teacher",
    ) -> None:
        """Writes the figures to `path` and the report to `report.html` beside it.

        Args:
            facts: `command` and the like, put among the figures.
            curves: the training's records, for the report.
        """
        report = {**self.figures, **facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
        write_report(
            path.parent, report, panels=self.panels, captions=self.captions, curves=curves,
            title=title, groups=self.groups, seeds=self.seeds, votes=read_votes(path),
        )  # fmt: skip


def evaluate(request: EvaluationRequest, folder: Path) -> Comparison | None:
    """Makes every model's images and judges them.

    Under torchrun every process makes its share of the images; the first one judges, the others
    return None.

    The distances are to a second set of the teacher's images, from other noise: the teacher's own
    distance to it is the floor, and a perfect student scores that.

    Args:
        folder: for the images; a run that finds them goes on from there.

    Raises:
        ExtractorError, ScorerError, ModelError: before any image is made.
    """
    for name in request.scores:
        check_scorer(name, scenes=request.prompts.scenes is not None)
    check_size(request.entries, request.size)
    make_folder(folder)
    for part in folder.iterdir():
        sweep(part)
    extractors = [load_extractor(name) for name in request.features]
    scorers = [load_scorer(name) for name in request.scores]
    for score in scorers:  # on a grey picture: one that fails should do so now
        score(torch.zeros(1, 3, *request.size), request.prompts.first())
    prompts, others = request.prompts, request.teacher.as_reference()
    memory = request.options.memory
    stores = [
        ImageStore(folder / entry.key, entry, prompts=prompts, size=request.size, memory=memory)
        for entry in (*request.entries, others)
    ]
    share = Share.here()
    make_all(stores, request.options, share=share)
    if not share.is_first:
        return None
    wait_for(
        lambda: not any(s.missing() for s in stores),
        share,
        what=lambda: "; ".join(
            f"{len(s.missing())} files of images in {s.folder} are missing"
            for s in stores
            if s.missing()
        ),
        folder=folder,
    )
    end_beats(folder)
    write_index(folder, stores, PART)

    with working("evaluate: judging"):
        return _judged(request, stores, extractors, scorers)


def _judged(
    request: EvaluationRequest,
    stores: Sequence[ImageStore],
    extractors: Sequence[Extractor],
    scorers: Sequence[Scorer],
) -> Comparison:
    """The comparison of sets that are all there; the last store is the reference."""
    prompts, others = request.prompts, stores[-1].entry
    pictures = _read_all(stores)
    reference = pictures.pop(others)
    scores = {
        entry: {name: v for score in scorers for name, v in score(images, prompts).items()}
        for entry, images in pictures.items()
    }
    aligned = {
        extractor.name: _aligned(request, extractor, pictures, scores, reference=reference)
        for extractor in extractors
    }
    main, *more = aligned
    result = _all_figures(aligned[main], request.halves)
    for name in more:
        for key, found in _all_figures(aligned[name], request.halves).items():
            result[key].setdefault("features", {})[name] = found
    if request.timed:
        for key, measured in _time(request).items():
            result[key] |= measured
    shown = min(_SHOWN, len(prompts.prompts))
    return Comparison(
        figures={
            "models": {e.key: _of_model(e, result) for e in request.entries},
            "floor": result[request.teacher.key]["frechet_to_teacher"],
            "gap_closed": {
                e.key: result[e.key]["gap_closed"]
                for e in request.entries
                if "gap_closed" in result[e.key]
            },
            "prompts": len(prompts.prompts),
            "images": len(prompts),
            "extractor": main,
            "halves": request.halves,
            **stamp(),
        },
        panels={entry.label: images[:shown] for entry, images in pictures.items()},
        captions=prompts.captions[:shown],
        seeds=prompts.noise_seeds()[:shown],
        groups=worst_pictures(
            aligned[main], request.entries, prompts, pictures=pictures, reference=reference
        ),
    )


def make_all(stores: Sequence[ImageStore], options: SamplerOptions, *, share: Share) -> None:
    """Makes what is missing of all stores, this process's share, one model in memory at a time."""
    loaded: dict[object, Sampler] = {}

    def load(store: ImageStore) -> Sampler:
        weights = store.entry.model, store.entry.loras
        if weights not in loaded:
            loaded.clear()  # one model in memory at a time
            loaded[weights] = options.load(store.entry.open(), store.prompts.prompts)
        return loaded[weights]

    # Stores of one model in a row, so that it is loaded once.
    for store in sorted(stores, key=lambda s: s.entry.model):
        count = sum(part.stop - part.start for part in share.of(store.parts))
        title = f"images of {store.entry.key}"
        with progress_bar(title, count, unit="images", hidden=not share.is_first) as advance:

            def on_images(made: int, advance: Callable[[int], None] = advance) -> None:
                advance(made)
                beat(stores[0].folder.parent, share)

            make_images(store, partial(load, store), share=share, on_images=on_images)


def _read_all(stores: Sequence[ImageStore]) -> dict[Entry, Tensor]:
    """Everyone's pictures; a student's previews stand before its results."""
    rows: dict[Entry, Tensor] = {}
    for store in stores:
        found = store.read()
        if found.previews is not None:
            rows[store.entry.as_preview()] = found.previews
        rows[store.entry] = found.images
    return rows


def _aligned(
    request: EvaluationRequest,
    extractor: Extractor,
    pictures: Mapping[Entry, Tensor],
    scores: Mapping[Entry, Mapping[str, Tensor]],
    *,
    reference: Tensor,
) -> AlignedSets:
    sets = {e.key: Measured(extractor(images), scores[e]) for e, images in pictures.items()}
    return AlignedSets(
        groups=request.prompts.groups,
        reference=Measured(extractor(reference), {}),
        teacher=sets[request.teacher.key],
        sets=sets,
        floor=request.teacher.key,
        naive=next((e.key for e in request.entries if e.kind == "naive"), None),
    )


def _all_figures(aligned: AlignedSets, halves: int) -> dict[str, dict[str, Any]]:
    """Figures and their intervals by key, as `metrics.json` nests them."""
    around = intervals(aligned, halves)
    result = {}
    for key, flat in figures(aligned).items():
        result[key] = nested(flat)
        if around.get(key):
            result[key]["interval"] = nested(around[key])
    return result


def _of_model(entry: Entry, result: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A model's figures, its preview's within."""
    preview = result.get(entry.as_preview().key)
    own = {"kind": entry.kind, **result[entry.key]}
    return own if preview is None else own | {"preview": preview}


def _time(request: EvaluationRequest) -> dict[str, dict[str, Any]]:
    prompts = request.prompts
    count = min(request.timed, len(prompts), pictures_at_once(*request.size))
    result = {}
    for entry in request.entries:
        sampler = request.options.load(entry.open(), [])
        noise = prompts.noise(slice(0, count), sampler.noise_shape(*request.size))
        latency = measure_latency(
            sampler,
            prompts.captions[:count],
            noise,
            steps=entry.steps,
            guidance_scale=entry.guidance_scale,
            sigmas=entry.sigmas,
        )
        result[entry.key] = {"seconds_per_image": latency.total, "latency": latency.as_dict()}
    return result
