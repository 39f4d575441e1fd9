"""The cards themselves, front matter included, as huggingface_hub reads them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from twostep.cards.origin import Origin, is_hub_id
from twostep.cards.scripts import lora_script, student_script
from twostep.evaluation.report.words import verdict
from twostep.method.schedule import Schedule
from twostep.runtime.files import write_text

_LICENCE = """
## Licence

The weights derive from the teacher's and from images it made: the teacher's licence applies. The
code in this folder, if any, is Apache-2.0.
"""
# What of an evaluation stands in the front matter, with its name for people.
_FIGURES = {
    "gap_closed": "share of the gap between 2 and 8 steps that is closed",
    "frechet_to_teacher": "Fréchet distance to the teacher's images",
    "accuracy": "accuracy",
    "diversity": "diversity, the teacher's is 1",
}
PICTURES = "images"
# Where a script says what the model is called.
_NAMED = re.compile(r'(?:DiffusionPipeline\.from_pretrained|load_lora_weights)\("([^"]+)"')


def student_card(
    name: str, schedule: Schedule, origin: Origin, *, size: tuple[int, int], server: bool = False
) -> str:
    """For a diffusers folder.

    Args:
        name: where its reader finds it: a folder's name, or an id of the hub.
        size: (height, width) in pixels, one that the model was made for.
        server: whether the class in its index is a plain string.
    """
    text = student_script(
        name, sigma=schedule.step2_sigma, transition=schedule.transition, size=size, server=server
    )
    return _card(name, text, origin, relation="finetune")


def lora_card(
    name: str,
    schedule: Schedule,
    origin: Origin,
    *,
    rank: int,
    size: tuple[int, int],
    lines: Sequence[str] = (),
) -> str:
    """For a pair of LoRA files on `origin.teacher`.

    Args:
        name, size: as for `student_card`.
        lines: what the truncation lost.
    """
    assert origin.teacher is not None
    text = lora_script(
        name,
        origin.teacher,
        sigma=schedule.step2_sigma,
        before_shift=schedule.before_shift([schedule.step2_sigma])[0],
        rank=rank,
        size=size,
        lines="\n".join(f"- {line}" for line in lines),
    )
    return _card(name, text, origin, relation="adapter")


def write_card(folder: Path, card: str, origin: Origin) -> None:
    """Writes `README.md` and the pictures that it shows.

    Raises:
        WriteError: if the disk refuses.
    """
    for picture in origin.pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / PICTURES / picture.name)
    write_text(folder / "README.md", card)


def renamed(card: ModelCard, repo: str) -> str:
    """The text of a card of ours, for a model that is to be found as `repo`."""
    card.data["model_name"] = repo.rpartition("/")[2]
    text = str(card)
    found = _NAMED.search(text)
    old = found[1] if found else repo
    for place in ('("{}"', "serve {} --omni", "--model-path {} "):
        text = text.replace(place.format(old), place.format(repo))
    return text


def _card(name: str, text: str, origin: Origin, *, relation: str) -> str:
    named = is_hub_id(origin.teacher) if origin.teacher else False
    title = name.removesuffix("/student").rpartition("/")[2]
    more: dict[str, Any] = dict(origin.licence)
    if named:
        more |= {"base_model": origin.teacher, "base_model_relation": relation}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["two-step", "distillation", "z-image", *(["lora"] if relation == "adapter" else [])],
        datasets=list(origin.datasets) or None,
        model_name=title,
        eval_results=list(_results(origin.figures or {})) or None,
        **more,
    )
    body = f"# {title}\n{text}{_told(origin)}{_LICENCE}"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _results(figures: dict[str, Any]) -> Iterator[EvalResult]:
    """Of the first student that was measured."""
    found = [v for k, v in figures.get("models", {}).items() if k.startswith("student")]
    for kind, words in _FIGURES.items():
        value = found[0].get(kind) if found else None
        value = value.get("overall") if isinstance(value, dict) else value
        if isinstance(value, int | float) and math.isfinite(value):
            yield EvalResult(
                task_type="text-to-image",
                dataset_type="prompts",
                dataset_name=f"{figures.get('prompts')} prompts",
                metric_type=kind,
                metric_name=words,
                metric_value=round(float(value), 4),
            )


def _told(origin: Origin) -> str:
    text = ""
    if origin.pictures:
        text += "\n## Pictures\n\n"
        for picture in origin.pictures:
            text += f"![pictures of the run at its end]({PICTURES}/{picture.name})\n"
    if origin.figures is not None:
        figures = origin.figures
        text += f"\n## How close it comes\n\n{verdict(figures)}\n\n"
        text += (
            f"{figures.get('images')} images of {figures.get('prompts')} prompts, features "
            f"{figures.get('extractor')}, {figures.get('date')}, commit {figures.get('commit')}.\n"
        )
    if origin.outcome.get("skipped") or origin.outcome.get("diverged"):
        text += "\n## What went wrong in training\n\n"
        text += "".join(
            f"- {count} updates or validations ({kind}) were refused: not finite\n"
            for kind, count in origin.outcome.get("skipped", {}).items()
        )
        text += "".join(f"- diverged: {phrase}\n" for phrase in origin.outcome.get("diverged", []))
    if origin.recipe is not None:
        text += f"\n## Recipe\n\n```yaml\n{origin.recipe}```\n"
    return text
