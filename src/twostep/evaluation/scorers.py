"""How well images show what their prompts ask for: one score per image, NaN where none applies."""

from __future__ import annotations

import difflib
import math
import re
import shutil
import unicodedata
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from twostep.emoji.inspector import Inspector, is_right
from twostep.emoji.scenes import CATEGORIES
from twostep.errors import UserError, missing_extra
from twostep.evaluation.external_scorer import ExternalScore
from twostep.evaluation.prompts import PromptSet
from twostep.runtime.images import to_bytes
from twostep.zoo import ZOO

# (images (N, 3, H, W) in -1..1, their prompts) -> scores (N,) by name
Scorer = Callable[[Tensor, PromptSet], dict[str, Tensor]]

NAMES = ("inspector", "ocr", "clip")
_CLIP: Literal["openai/clip-vit-base-patch16"] = "openai/clip-vit-base-patch16"
# Text that a prompt wants to see, in straight, typographic or Chinese quotation marks.
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|「([^」]+)」|『([^』]+)』")


class ScorerError(UserError, ValueError):
    """A scorer that is unknown or does not fit the prompts."""


def load_scorer(name: str) -> Scorer:
    """One of `NAMES`, or a program of the user's, `NAME=COMMAND`.

    Raises:
        ScorerError: naming what is allowed.
        MissingExtraError: naming what to install.
    """
    if name == "inspector":
        inspector = Inspector.load(ZOO / "inspector")
        return lambda images, prompts: inspector_scores(inspector, images, prompts)
    if name == "ocr":
        return _ocr()
    if name == "clip":
        return _clip()
    if "=" in name:
        return _external(name)
    raise ScorerError(f"scores: {name!r} is unknown; allowed: {', '.join(NAMES)}, and NAME=COMMAND")


def check_scorer(name: str, *, scenes: bool, option: str = "scores") -> None:
    """Whether a scorer can be there and judge such prompts; loads and runs nothing.

    Args:
        scenes: the prompts are of the embedded world, scenes known.

    Raises:
        ScorerError: naming `option` and what is allowed.
    """
    if name == "inspector" and not scenes:
        raise ScorerError(
            f"{option}: the inspector judges only prompts of the embedded world (emoji), "
            "in `twostep evaluate`"
        )
    if "=" in name:
        try:
            command = ExternalScore(name).command[0]
        except ValueError as error:
            raise ScorerError(f"{option}: {error}") from error
        if shutil.which(command) is None:
            raise ScorerError(f"{option}: {name.partition('=')[0]}: no program {command!r} here")
    elif name not in NAMES:
        raise ScorerError(
            f"{option}: {name[:200]!r} is unknown; allowed: {', '.join(NAMES)}, and NAME=COMMAND"
        )


def inspector_scores(inspector: Inspector, images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
    """1 where the inspector finds what a scene asks for: `accuracy.overall`, per category and
    `accuracy.background`.

    Raises:
        ScorerError: if the prompts have no scenes.
    """
    if prompts.scenes is None:
        raise ScorerError("scores: the inspector judges only prompts of the embedded world (emoji)")
    scenes = prompts.scenes * prompts.seeds_per_prompt
    verdicts = [is_right(s, f) for s, f in zip(scenes, inspector.detect(images), strict=True)]
    scores = {"accuracy.overall": [float(v.all) for v in verdicts]}
    for category in CATEGORIES:
        scores[f"accuracy.{category}"] = [
            float(v.objects and v.count and v.relation) if s.category == category else math.nan
            for s, v in zip(scenes, verdicts, strict=True)
        ]
    scores["accuracy.background"] = [float(v.background) for v in verdicts]
    return {name: torch.tensor(values) for name, values in scores.items()}


def quoted_text(prompt: str) -> str | None:
    """What a prompt wants written in the image, its quoted parts in order; None if nothing."""
    parts = ["".join(groups) for groups in _QUOTED.findall(prompt)]
    return " ".join(parts) or None


def text_similarity(wanted: str, found: str) -> float:
    """1 for the same letters and digits, 0 for none in common; case and spacing do not count."""
    a, b = _letters(wanted), _letters(found)
    if not a:
        return float(not b)
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def _letters(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def _ocr() -> Scorer:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise missing_extra("evaluation", error, option="scores: ocr") from error
    reader = RapidOCR(params={"Global.log_level": "error"})

    def score(images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
        values = []
        for image, caption in zip(images, prompts.captions, strict=True):
            wanted = quoted_text(caption)
            if wanted is None:
                values.append(math.nan)
                continue
            pixels = to_bytes(image).permute(1, 2, 0).numpy()
            found = reader(np.ascontiguousarray(pixels[..., ::-1])).txts or ()
            values.append(text_similarity(wanted, " ".join(found)))
        return {"ocr": torch.tensor(values)}

    return score


def _clip() -> Scorer:
    try:
        from torchmetrics.multimodal import CLIPScore

        metric = CLIPScore(_CLIP)
    except ImportError as error:
        raise missing_extra("evaluation", error, option="scores: clip") from error
    except OSError as error:
        raise ScorerError(f"scores: the weights of {_CLIP} cannot be had: {error}") from error

    def score(images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
        # A forward gives the score of what it is given: one image, one score.
        pairs = zip(to_bytes(images), prompts.captions, strict=True)
        return {"clip_score": torch.stack([metric(i[None], [c]).cpu() for i, c in pairs])}

    return score


def _external(text: str) -> Scorer:
    try:
        external = ExternalScore(text)
    except ValueError as error:
        raise ScorerError(f"scores: {error}") from error

    def score(images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
        try:
            return external(images, prompts)
        except ValueError as error:
            raise ScorerError(f"scores: {error}") from error

    return score
