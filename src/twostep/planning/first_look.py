"""What a recipe's names, sizes and places say of it, before torch is imported: within a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from twostep.data.cache.spec import check_sizes
from twostep.data.prompts import check_source
from twostep.errors import ModelError, RecipeError
from twostep.models.folder import ModelFolder
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import check_device_name


def first_look(recipe: Recipe, *, planning: bool = False) -> None:
    """Whether a recipe names things that are there; the rest is `preflight.py`'s.

    Args:
        planning: only a plan is made, for a machine that may have other prompts and files.

    Raises:
        RecipeError, ModelError, PromptError: naming the setting, its value and what is allowed.
    """
    check_device_name(recipe.training.device)
    if not planning:
        check_packages(recipe)
        check_source(recipe.data.prompts, option="data.prompts")
        for index, lora in enumerate(recipe.teacher.loras):
            if not lora.path.is_file():
                raise ModelError(f"teacher.loras[{index}]: no file at {lora.path}")
    if is_here(recipe.teacher.model):
        teacher = ModelFolder.open(recipe.teacher.model)
        teacher.check_teacher("teacher.model")
        check_sizes(recipe, teacher)


def is_here(model: str) -> bool:
    """Whether a model's name cannot mean one of the hub's."""
    return model.startswith("zoo:") or Path(model).is_dir() or model.count("/") != 1


def is_installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def check_packages(recipe: Recipe) -> None:
    """Raises RecipeError for a package that the recipe needs and that is not there."""
    for package in recipe.training.report_to:
        if not is_installed(package):
            raise RecipeError(
                f"training.report_to: {package} needs the package {package}, which is not "
                f'installed: `pip install "twostep[{package}]"`'
            )
