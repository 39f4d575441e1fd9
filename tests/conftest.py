"""A tiny Z-Image folder with random weights, in the stock diffusers layout, and recipes for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from transformers import Qwen3Config, Qwen3Model

from tiny import TEXT_WIDTH, random_transformer
from twostep.recipe.schema import Recipe
from twostep.zoo import ZOO

# Small networks lose time to a second thread, and pytest-xdist runs one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' `set_attention_backend` is for all models and for good; here, for one test."""
    backend = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", backend)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher: transformer, text encoder, VAE, scheduler of random weights; a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    random_transformer().save_pretrained(folder / "transformer")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    Qwen3Model(config).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKL(
        latent_channels=8,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.8,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    shutil.copytree(ZOO / "emoji-parts" / "tokenizer", folder / "tokenizer")
    index = json.loads((ZOO / "emoji-teacher" / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def make_recipe(tiny_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on the tiny teacher that trains in seconds; keyword arguments replace sections."""

    def make(name: str = "tiny", **sections: dict[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "name": name,
            "teacher": {"model": str(tiny_folder), "steps": 4},
            "data": {
                "prompts": "emoji",
                "prompt_count": 12,
                "samples_per_prompt": 2,
                "samples_per_file": 8,
                "height": 32,
                "width": 32,
                "cache": str(tmp_path / "cache"),
            },
            "losses": {"warmup_turns": 2},
            "critic": {"layers": [0, 1], "width": 8},
            "training": {
                "turns": 6,
                "batch_size": 4,
                "critic_warmup_turns": 1,
                "log_every": 1,
                "sample_every": 3,
                "validate_every": 3,
                "validation_samples": 8,
                "save_every": 2,
                "sample_prompts": 3,
                "autocast": False,
                "device": "cpu",
            },
            "output": str(tmp_path / "runs"),
        }
        for section, changes in sections.items():
            if isinstance(changes, dict):
                values[section] = {**values.get(section, {}), **changes}
            else:
                values[section] = changes
        return Recipe.parse(values)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; where CI lacks it, a failure."""
    executable = shutil.which("chromium")
    if executable is None:
        reason = "no `chromium` on PATH: apt-get update && apt-get install -y chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()
