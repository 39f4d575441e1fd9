"""`twostep distill --ray`: the workers of a Ray cluster give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import assert_same_run
from twostep.data.cache.build import open_cache
from twostep.distill import on_ray
from twostep.distill.trainer import Trainer
from twostep.errors import MissingExtraError
from twostep.recipe.schema import Recipe


@pytest.mark.slow
@pytest.mark.distributed
def test_two_workers_equal_one_process(
    make_recipe: Callable[..., Recipe], tmp_path: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("ray")
    alone = make_recipe("alone")
    Trainer(alone, open_cache(alone)).train()
    recipe = make_recipe("workers", distributed={"sharding": "shard"})
    path = tmp_path / "workers.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "twostep", "distill", str(path), "--ray", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert_same_run(alone, recipe, tiny_folder)


def test_without_ray_the_extra_is_named(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--ray needs this package's extra \"ray\""):
        on_ray.distill_on_ray(make_recipe(), 2)
