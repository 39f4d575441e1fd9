"""Rules across the sections of a recipe, and what may change while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twostep.recipe.schema import Recipe

# What may change between a run and its continuation: how long and how often, not what is learnt.
# The whole section `distributed` may, too.
MAY_CHANGE = frozenset(
    f"training.{key}"
    for key in (
        "turns", "minutes", "log_every", "sample_every", "sample_prompts", "validate_every",
        "save_every", "keep_checkpoints", "tensorboard", "max_non_finite", "compile", "device",
        "checkpoint_activations", "checkpoint_share", "micro_batch", "async_saves",
    )
)  # fmt: skip


# Where things are, not what they are.
PLACES = ("data.cache", "data.cache_copies", "data.cache_copies_gib", "teacher.model")


def check(recipe: Recipe) -> None:
    """Raises ValueError for settings that are each allowed, but not together."""
    _guidance_has_a_source(recipe)
    _lora_fits(recipe)
    _sharding_fits(recipe)
    if recipe.training.best_by == "score" and not recipe.training.validation_scores:
        raise ValueError("training.best_by: score needs training.validation_scores")
    if recipe.losses.warmup_turns > recipe.training.turns:
        raise ValueError(
            f"losses.warmup_turns ({recipe.losses.warmup_turns}) exceeds "
            f"training.turns ({recipe.training.turns})"
        )


def _guidance_has_a_source(recipe: Recipe) -> None:
    score, losses = recipe.score, recipe.losses
    augmented = losses.final.guidance_augmentation + losses.step1.guidance_augmentation
    if augmented and score.model is None and not score.fit_turns:
        raise ValueError(
            "losses.*.guidance_augmentation needs score.model or a fitted score: guidance "
            "makes no sense for a guidance-free teacher (Z-Image issue 110)"
        )
    unprompted = score.fit_turns == 0 or score.caption_dropout > 0
    if (score.guidance_scale or augmented) and not unprompted:
        raise ValueError(
            "score.fit_turns fits the score to captioned images alone: score.guidance_scale "
            "and losses.*.guidance_augmentation must be 0, or score.caption_dropout above 0"
        )


def _lora_fits(recipe: Recipe) -> None:
    student = recipe.student
    if recipe.score.fit_turns and recipe.score.model and student.weights == "lora":
        raise ValueError(
            "score.fit_turns with student.weights: lora fits an adapter on the teacher; "
            "leave score.model empty"
        )
    if recipe.losses.consistency and student.steps != "shared":
        raise ValueError(
            "losses.consistency needs student.steps: shared, since one network must "
            f"answer at every noise level; got {student.steps}"
        )


def _sharding_fits(recipe: Recipe) -> None:
    sharding = recipe.distributed
    if sharding.sharding == "replicate" and (sharding.shard_size or sharding.cpu_offload):
        raise ValueError("distributed.shard_size and cpu_offload need distributed.sharding: shard")
    if sharding.sharding == "shard" and recipe.training.optimizer == "adafactor":
        raise ValueError(
            "training.optimizer: adafactor needs whole matrices; with distributed.sharding: "
            "shard use adamw, whose states are sharded too"
        )
    if sharding.sharding == "shard" and recipe.student.weights == "lora":
        raise ValueError(
            "distributed.sharding: shard is for full sets of weights; with "
            "student.weights: lora every process holds the one backbone"
        )


def differences(begun: Recipe, now: Recipe, *, same_data: bool = False) -> list[str]:
    """What `now` may not change of the run that `begun` began, a phrase for each key.

    Args:
        same_data: the teacher's weights and the cache's contents are known to be the same, whatever
            their folders are called now.
    """
    before, after = (flatten(recipe.model_dump(mode="json")) for recipe in (begun, now))
    for values in (before, after):
        for key in ("output", "name", *(PLACES if same_data else ())):
            values.pop(key, None)
        if same_data:
            values["teacher.loras"] = [
                {k: v for k, v in lora.items() if k != "path"} for lora in values["teacher.loras"]
            ]
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in MAY_CHANGE
        and not key.startswith("distributed.")
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
