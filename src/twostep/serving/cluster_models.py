"""The user's models as a cluster's replicas load them; folders lie under one path everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from twostep.serving.catalogue import Catalogue
from twostep.serving.jobs import StepModel
from twostep.serving.served_model import HoldingOptions, ModelChoice, load_models, open_models
from twostep.serving.split_model import Part, check_split, load_part

Size = tuple[int, int] | None


def stages_of(
    choices: Sequence[ModelChoice], *, size: Size, holding: HoldingOptions, two_stage: bool
) -> dict[str, Callable[[], Mapping[str, StepModel]]]:
    """What loads the models of each stage's replicas: one stage of whole models, or two.

    Raises:
        InputError, ModelError: for what cannot be used; the folders are opened here, too.
    """
    opened = open_models(choices, size=size)
    if not two_stage:
        return {"models": partial(_whole, choices, size, holding)}
    check_split(opened)
    parts: tuple[Part, Part] = ("first", "second")
    return {f"{part}_step": partial(_part, choices, size, holding, part) for part in parts}


def catalogue_of(choices: Sequence[ModelChoice], size: Size) -> Catalogue:
    """What the front offers."""
    return {each.offer.name: each.offer for each in open_models(choices, size=size)}


def _whole(
    choices: Sequence[ModelChoice], size: Size, holding: HoldingOptions
) -> Mapping[str, StepModel]:
    return load_models(open_models(choices, size=size), holding)


def _part(
    choices: Sequence[ModelChoice], size: Size, holding: HoldingOptions, part: Part
) -> Mapping[str, StepModel]:
    return load_part(open_models(choices, size=size), holding, part)
