"""In what a cache differs from what a recipe asks for, by the recipe's keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twostep.data.cache.spec import CacheSpec


def described(spec: CacheSpec) -> dict[str, Any]:
    """What a manifest says of a cache's contents."""
    prompts = hashlib.sha256(json.dumps(spec.prompts).encode()).hexdigest()
    return {
        "teacher": spec.teacher.name,
        "teacher_sha256": spec.teacher.fingerprint,
        "prompts_sha256": prompts,
        "sigmas": spec.sigmas,
        "guidance_scale": spec.guidance_scale,
        "step2_sigma": spec.schedule.step2_sigma,
        "samples": spec.sample_count,
        "samples_per_prompt": spec.samples_per_prompt,
        "sizes": [list(size) for size in spec.sizes],
        "seed": spec.seed,
        "dtype": spec.dtype,
    }


# In this order: what is written of one often follows from what stands before it.
_KEYS = {
    "teacher_sha256": "teacher.model (its weights)",
    "dtype": "teacher.dtype",
    "sigmas": "teacher.steps or shift",
    "guidance_scale": "teacher.guidance_scale",
    "step2_sigma": "step2_sigma",
    "sizes": "data.height, width or other_sizes",
    "samples_per_prompt": "data.samples_per_prompt",
    "seed": "data.seed",
    "samples": "data.prompt_count",
    "prompts_sha256": "data.prompts",
}


def another_recipe(spec: CacheSpec, manifest: Mapping[str, Any]) -> str:
    """That a finished cache is another recipe's, by which keys, and what to do."""
    wanted = described(spec)
    found: list[str] = []
    for key, name in _KEYS.items():
        if key not in manifest or manifest[key] == wanted[key]:
            continue  # earlier versions did not say everything
        if key == "prompts_sha256" and found and found[-1].startswith("data."):
            continue  # a consequence
        short = key.endswith("sha256") or key == "sigmas"
        found.append(name if short else f"{name} {manifest[key]}, now {wanted[key]}")
    what = "; ".join(found) or "another teacher, schedule or prompt set"
    return (
        f"data.cache: {spec.location} was made with {what}. Name another data.cache, or rebuild "
        f"it: {REPAIR}"
    )


REPAIR = "`twostep teach RECIPE --repair`, with this recipe and its overrides"
