"""Rules across the sections of a recipe, and what may change while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twostep.recipe.objective import Step1Losses

if TYPE_CHECKING:
    from twostep.recipe.schema import Recipe

# What may change between a run and its continuation: how long and how often, not what is learnt.
# The whole section `distributed` may, too.
MAY_CHANGE = frozenset(
    f"training.{key}"
    for key in (
        "turns", "minutes", "log_every", "sample_every", "sample_prompts", "validate_every",
        "save_every", "keep_checkpoints", "report_to", "max_non_finite", "compile", "device",
        "checkpoint_activations", "checkpoint_share", "micro_batch", "async_saves",
    )
)  # fmt: skip


# Where things are, not what they are.
PLACES = ("data.cache", "data.cache_copies", "data.cache_copies_gib", "teacher.model")


# The most that a count may be: above it something hangs, or no machine has the memory.
MOST = {
    "teacher.steps": 10_000,
    "score.fit_turns": 10**12,
    "data.prompt_count": 100_000_000,
    "data.samples_per_prompt": 100_000,
    "data.samples_per_file": 10_000_000,
    "data.height": 65_536,
    "data.width": 65_536,
    "student.rank": 65_536,
    "losses.warmup_turns": 10**12,
    "critic.width": 65_536,
    "training.turns": 10**12,
    "training.batch_size": 1_000_000,
    "training.critic_turns": 10_000,
    "training.critic_warmup_turns": 10**9,
    "training.validation_samples": 1_000_000,
    "training.sample_prompts": 1_000,
    "training.keep_checkpoints": 100_000,
    "training.max_non_finite": 10**9,
}
_MOST_EMOJI = 1_000_000


def check(recipe: Recipe) -> None:
    """Raises ValueError for settings that are each allowed, but not together, or too large."""
    _numbers_have_limits(recipe)
    _something_is_learnt(recipe)
    _guidance_has_a_source(recipe)
    _lora_fits(recipe)
    _sharding_fits(recipe)
    _pairs_fit(recipe)
    if recipe.training.best_by == "score" and not recipe.training.validation_scores:
        raise ValueError("training.best_by: score needs training.validation_scores")
    if recipe.losses.warmup_turns > recipe.training.turns:
        raise ValueError(
            f"losses.warmup_turns ({recipe.losses.warmup_turns}) exceeds "
            f"training.turns ({recipe.training.turns})"
        )


def _numbers_have_limits(recipe: Recipe) -> None:
    values = flatten(recipe.model_dump(mode="python"))
    for key, most in MOST.items():
        if values[key] > most:
            raise ValueError(f"{key}: must be at most {most}, got {_shown(values[key])}")
    if recipe.data.prompts == "emoji" and recipe.data.prompt_count > _MOST_EMOJI:
        raise ValueError(
            f"data.prompt_count: the embedded world has {_MOST_EMOJI} scenes at most, "
            f"got {recipe.data.prompt_count}"
        )
    for key in ("data.seed", "training.seed"):
        if not 0 <= values[key] < 2**63:
            raise ValueError(f"{key}: must be from 0 to 2^63 - 1, got {_shown(values[key])}")
    for key in ("score.betas", "fake.betas", "training.betas"):
        if any(beta >= 1 for beta in values[key] or ()):
            raise ValueError(f"{key}: each must be below 1, got {list(values[key])}")
    if recipe.shift is not None and not 1e-3 <= recipe.shift <= 1e3:
        raise ValueError(f"shift: must be from 0.001 to 1000, got {recipe.shift}")
    low, high = recipe.critic.tau_range
    if low >= high:
        raise ValueError(f"critic.tau_range: must ascend, got {[low, high]}")
    if recipe.training.validation_samples < 2:
        raise ValueError("training.validation_samples: must be at least 2, two seeds of a prompt")
    if str(recipe.output).startswith("~"):
        raise ValueError(f"output: ~ is not read as a home folder here, got {str(recipe.output)!r}")


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**30 else "a number of more than 30 digits"


def _something_is_learnt(recipe: Recipe) -> None:
    """After the warm-up, too."""
    losses = recipe.losses
    if losses.consistency or recipe.training.turns <= losses.warmup_turns:
        return
    for step in (losses.final, losses.step1):
        terms = (step.distribution_matching, step.guidance_augmentation)
        followed = step.trajectory if isinstance(step, Step1Losses) else 0.0
        if step.weight and any((*terms, step.adversarial, step.regression, followed)):
            return
    raise ValueError(
        "losses.final and losses.step1: a weight above 0, with a term above 0, is needed in one of "
        "them, or every turn must be of the warm-up (losses.warmup_turns)"
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
    if student.trained == "linear" and student.weights == "lora":
        raise ValueError(
            "student.trained: linear is for student.weights: full; adapters are on linear layers"
        )
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


def _pairs_fit(recipe: Recipe) -> None:
    settings = recipe.training
    if settings.joint_turns and recipe.critic.paired and settings.batch_size % 2:
        raise ValueError(
            "training.batch_size must be even with training.joint_turns and critic.paired, which "
            f"pairs every other sample; got {settings.batch_size}"
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
