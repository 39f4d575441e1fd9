"""`distill` on the workers of a Ray cluster, as torchrun would start them on one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from twostep.data.cache.build import open_cache
from twostep.data.cache.spec import CacheSpec
from twostep.distill.run_folder import RunFolder
from twostep.distill.trainer import Trainer
from twostep.errors import UserError
from twostep.recipe.schema import Recipe
from twostep.runtime.ray_cluster import connect_ray


class RayError(UserError, RuntimeError):
    """A run on Ray failed."""


def distill_on_ray(recipe: Recipe, workers: int) -> Path:
    """Builds the cache and trains on `workers` processes, a GPU each where the cluster has GPUs.

    Connects to the cluster that RAY_ADDRESS names, or starts one on this machine. All machines must
    see this folder under the same path. A worker that dies makes Ray start all of them again, three
    times at most; they go on from the last checkpoint.

    Raises:
        RecipeError, ModelError, PromptError: for what the recipe names wrongly.
        MissingExtraError: without this package's extra `ray`.
        RayError: when the run failed.
    """
    CacheSpec.of(recipe)  # what the recipe names wrongly is told here, not by a worker
    ray = connect_ray("--ray")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = recipe.training.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": recipe.to_yaml(), "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        # gloo beside NCCL serves what lives on the CPU: offloaded weights and checkpoints.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=recipe.name,
            storage_path=str((recipe.run_folder / "ray").resolve()),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise RayError(f"the run on Ray failed: {error}") from error
    return RunFolder(recipe.run_folder).student


def _work(settings: dict[str, Any]) -> None:
    os.chdir(settings["folder"])
    recipe = Recipe.parse(yaml.safe_load(settings["recipe"]))
    Trainer(recipe, open_cache(recipe)).train()
