"""The finished student in use: one picture, and the pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from twostep.evaluation.evaluate import EvaluationRequest
from twostep.evaluation.image_store import PART
from twostep.planning.checking import count_decoding
from twostep.planning.generation import Steps, generation_needs
from twostep.planning.stages import Stage
from twostep.planning.weightless import CPU, open_weightless
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.images import pictures_at_once
from twostep.runtime.shape_tensors import ShapesOnly


def using_stages(
    recipe: Recipe,
    prompt_tokens: int,
    dtype: torch.dtype,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Stage]:
    """`twostep generate`, a picture at a time, and `twostep evaluate`, a batch at a time."""
    size = (recipe.data.height, recipe.data.width)
    adapters = recipe.student.weights == "lora" and not recipe.teacher.loras
    steps: Steps = "lora" if adapters else "two_sets"
    needs = partial(
        generation_needs, recipe.teacher.model, steps, "plain", size,
        prompt_tokens=prompt_tokens, rank=recipe.student.rank, dtype=dtype,
    )  # fmt: skip
    one = needs()
    advance(2)
    many = needs(batch_size=pictures_at_once(*size))
    advance(2)
    with ShapesOnly():
        placement = Placement(CPU, dtype)
        folder = open_weightless(recipe.teacher.model)
        _, decoding = count_decoding(folder, size, PART, placement)
    # Timing takes its pictures in one batch, their prompts encoded each time.
    timed = needs(batch_size=min(EvaluationRequest.timed, pictures_at_once(*size)))
    all_there = timed.text_encoder + timed.transformers + timed.decoder
    timing = all_there + max(timed.steps, timed.decoding)
    judged = many.transformers + many.decoder + max(many.steps, decoding.peak)
    return [
        Stage("generate", one.peak),
        Stage("evaluate: pictures", max(many.text_encoder, judged)),
        Stage("evaluate: timing", timing),
    ]
