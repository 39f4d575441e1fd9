"""`student.trained: linear`: a full student that two LoRA files hold without loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twostep.data.cache.build import open_cache
from twostep.distill.trainer import Trainer
from twostep.errors import RecipeError
from twostep.exports.registry import ExportOptions, export
from twostep.families.zimage import ZImage
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.recipe.schema import Recipe


def test_the_linear_layers_matrices_alone_move_and_a_lora_pair_holds_them(
    make_recipe: Callable[..., Recipe], tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(student={"trained": "linear"}, training={"turns": 3, "save_every": 3})
    folder = Trainer(recipe, open_cache(recipe)).train()
    name = "diffusion_pytorch_model.safetensors"
    before = load_file(tiny_folder / "transformer" / name)
    skeleton = ZImage().without_weights(tiny_folder, "transformer", torch.float32)
    linear = {f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    for part in ("transformer", "transformer_2"):
        after = load_file(folder / part / name)
        for key, value in after.items():
            still = torch.equal(value, before[key].to(value.dtype))
            assert still is (key not in linear), key
    # Whom the umask lets may read everything that a run writes.
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {p.stat().st_mode & 0o777 for p in recipe.run_folder.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~umask}
    options = ExportOptions(teacher=str(tiny_folder), rank=256, dtype=torch.float32)
    lines = export(str(folder), "lora", tmp_path / "pair", options)
    # What the student's bf16 takes of biases and norms is all that the files cannot hold.
    assert "keeps 100.0%" in lines[0]
    noise = seeded_noise([3], (8, 8, 8))
    pair, whole = (
        Sampler.load(str(f)).sample(["a dog"], noise).latents for f in (tmp_path / "pair", folder)
    )
    assert (pair - whole).norm() < 2e-2 * whole.norm()


def test_adapters_have_no_other_parameters(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(
        RecipeError, match=r"student\.trained: linear is for student\.weights: full"
    ):
        make_recipe(student={"trained": "linear", "weights": "lora"})
