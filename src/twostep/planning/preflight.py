"""Everything that a recipe, folders and disks can say of a run before any network is loaded.

`twostep distill --dry-run`, `plan`, `teach` and `distill` all begin with it: what cannot work is
refused in seconds, not after the teacher's hours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn

from twostep.data.cache.differences import another_recipe
from twostep.data.cache.spec import CacheSpec, check_sizes
from twostep.data.cache.store import is_url
from twostep.data.real_images import check_reals
from twostep.distill.batches import divide_batch
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.roles import Roles
from twostep.distill.run_folder import RunFolder
from twostep.errors import RecipeError
from twostep.evaluation.scorers import check_scorer
from twostep.models.folder import ModelFolder
from twostep.planning.disk import cache_bytes, student_bytes
from twostep.planning.first_look import check_packages, is_here
from twostep.planning.memory import check_memory
from twostep.planning.places import Need, check_apart, check_place, check_space
from twostep.planning.roles import plan_roles
from twostep.planning.run import checkpoint_bytes
from twostep.planning.weightless import CPU, load_weightless, open_weightless
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import pick_device
from twostep.runtime.processes import Share

# Tokens of a caption, for the size of a cache that is not there yet.
_CAPTION_TOKENS = 64


def check_plan(recipe: Recipe, *, processes: int = 1) -> Roles:
    """What can be known of a recipe without this machine's disks, weights or prompts.

    Returns:
        Its roles, on the meta device.

    Raises:
        RecipeError, ModelError: naming the setting, its value and what is allowed.
    """
    folder = open_weightless(recipe.teacher.model)
    folder.check_teacher("teacher.model")
    check_sizes(recipe, folder)
    divide_batch(
        recipe.training.batch_size, processes=processes, micro_batch=recipe.training.micro_batch
    )
    return _roles(recipe, folder)


def check_here(
    recipe: Recipe, *, teaching: bool = False, repair: bool = False, fetch: bool = True
) -> None:
    """Whether a recipe can run on this machine, as far as that can be known.

    Args:
        teaching: only its cache is to be built.
        repair: a cache of another recipe may be in the way.
        fetch: a teacher on the hub may be fetched; without, only its configuration is looked at.

    Raises:
        RecipeError, ModelError, PromptError, InputError: naming the setting, its value and what is
            allowed.
    """
    device = pick_device(recipe.training.device)
    check_packages(recipe)
    if recipe.data.reals != "teacher":
        check_reals(Path(recipe.data.reals))
    for name in recipe.training.validation_scores:
        check_scorer(name, scenes=False, option="training.validation_scores")
    if not fetch and not is_here(recipe.teacher.model):
        check_plan(recipe, processes=Share.here().size)
        _check_places(recipe, None)
        return
    spec = CacheSpec.of(recipe)
    divide_batch(
        recipe.training.batch_size,
        processes=Share.here().size,
        micro_batch=recipe.training.micro_batch,
    )
    roles = _roles(recipe, spec.teacher)
    if not teaching:
        processes = Share.here().size
        check_memory(recipe, spec.teacher, roles, processes=processes, device=device)
    _check_places(recipe, spec.teacher)
    if not repair:
        _check_cache(spec)
    if not teaching:
        RunFolder(recipe.run_folder).check_free()
        RunFolder(recipe.run_folder).check_same_recipe(
            recipe.with_lora_checksums([lora.sha256 for lora in spec.teacher.loras]),
            spec.fingerprint,
        )
    _check_space(recipe, spec, roles, teaching=teaching)


def _roles(recipe: Recipe, folder: ModelFolder) -> Roles:
    """Every role on the meta device, once what would fail there obscurely is checked."""
    settings = recipe.training.model_copy(update={"compile": False})
    counted = recipe.model_copy(update={"training": settings})
    if recipe.score.model is not None:
        score = str(open_weightless(recipe.score.model).path)
        counted = counted.model_copy(
            update={"score": recipe.score.model_copy(update={"model": score})}
        )
    if recipe.student.weights == "lora":
        _check_adapters(recipe, folder)
    with torch.device("meta"):
        return build_roles(counted, folder, device=CPU, load=load_weightless)


def _check_adapters(recipe: Recipe, folder: ModelFolder) -> None:
    pattern = recipe.student.target_modules
    try:
        matches = re.compile(pattern).fullmatch
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"student.target_modules: {pattern[:200]!r} is no regular expression: {error}"
        ) from error
    network = load_weightless(folder, "transformer", torch.bfloat16)
    found = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and matches(name)
    ]
    if not found:
        raise RecipeError(f"student.target_modules: no linear layer matches {pattern[:200]!r}")
    most = max(min(layer.in_features, layer.out_features) for layer in found)
    if recipe.student.rank > most:
        raise RecipeError(
            f"student.rank: must be at most {most}, the largest rank that a matrix of this model "
            f"can have, got {recipe.student.rank}"
        )


def _check_places(recipe: Recipe, teacher: ModelFolder | None) -> None:
    run = RunFolder(recipe.run_folder)
    cache = None if is_url(recipe.data.cache) else Path(recipe.data.cache)
    check_place(run.path, "output and name")
    if cache is None:
        check_place(recipe.data.cache_copies, "data.cache_copies")
    else:
        check_place(cache, "data.cache")
    parts = (run.student, run.checkpoints, run.best, run.frozen, run.path / "samples")
    for part in parts:
        if teacher is not None:
            check_apart(teacher.path, "teacher.model", part)
        if cache is not None:
            check_apart(cache, "data.cache", part)
    if teacher is not None and not teacher.name.startswith("zoo:"):
        if cache is not None:
            check_apart(cache, "data.cache", teacher.path, inside_only=True)
        check_apart(run.path, "output and name", teacher.path, inside_only=True)


def _check_cache(spec: CacheSpec) -> None:
    """A finished cache of something else is no place for this one."""
    manifest = spec.folder / "manifest.json"
    if spec.store.is_remote or not manifest.is_file():
        return
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        found = said["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # said where the cache is opened
    if found != spec.fingerprint:
        raise RecipeError(another_recipe(spec, said))


def _check_space(recipe: Recipe, spec: CacheSpec, roles: Roles, *, teaching: bool) -> None:
    needs = []
    if not spec.store.is_remote:
        size = cache_bytes(recipe, spec.teacher, _CAPTION_TOKENS)
        needs.append(Need("data.cache", spec.folder, size))
    if not teaching:
        held = plan_roles(recipe, roles, 1)
        checkpoint = checkpoint_bytes(held, roles, 1)
        # One more than is kept, while the newest is written; the best student; the student.
        kept = (recipe.training.keep_checkpoints + 1) * checkpoint
        kept = min(kept, (recipe.training.turns // recipe.training.save_every + 2) * checkpoint)
        size = kept + student_bytes(spec.teacher)
        needs.append(Need("output", recipe.run_folder, size))
    check_space(needs)
