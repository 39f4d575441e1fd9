"""Distil an 8-step text-to-image flow model into two steps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twostep.inference.pipeline import TwoStepPipeline
    from twostep.inference.sampler import Sampler
    from twostep.method.rollout import seeded_noise
    from twostep.recipe.schema import Recipe

    __version__: str

__all__ = ["Recipe", "Sampler", "TwoStepPipeline", "__version__", "seeded_noise"]

# Imported when first asked for: `import twostep` alone imports no torch.
_HOMES = {
    "Recipe": "twostep.recipe.schema",
    "Sampler": "twostep.inference.sampler",
    "TwoStepPipeline": "twostep.inference.pipeline",
    "seeded_noise": "twostep.method.rollout",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("twostep")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'twostep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
