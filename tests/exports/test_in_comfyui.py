"""ComfyUI's own code on exported files, of a student of Z-Image's width with few layers.

Wants ComfyUI's source and a Python that has what it imports:
TWOSTEP_COMFYUI=/path/to/ComfyUI TWOSTEP_COMFYUI_PYTHON=/path/to/python; 8 GB of memory.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.exports.comfyui import export_comfyui
from twostep.families import FAMILIES
from twostep.families.family import PromptBatch
from twostep.method.rollout import first_step, second_step
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import save_lora
from twostep.models.student import write_lora_index, write_student
from twostep.models.velocity import bind

COMFYUI = os.environ.get("TWOSTEP_COMFYUI")
PYTHON = os.environ.get("TWOSTEP_COMFYUI_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMFYUI is None, reason="TWOSTEP_COMFYUI names no ComfyUI"),
]
SCHEDULE = Schedule(3.0, 0.75)
SIDE = 64


def wide(seed: int) -> ZImageTransformer2DModel:
    """Z-Image Turbo's own configuration with 2 of its 30 layers; weights random, in bf16."""
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            dim=3840, n_layers=2, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560,
            in_channels=16, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
        )  # fmt: skip
    # The same million numbers again and again: a billion take long to draw.
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weights = {}
    for key, like in model.state_dict().items():
        values = noise.repeat(like.numel() // len(noise) + 1)[: like.numel()].view(like.shape)
        is_norm = "norm" in key and like.ndim == 1
        weights[key] = 1 + 0.1 * values if is_norm else values * like.shape[-1] ** -0.5
    model.load_state_dict(weights, assign=True)
    return model.to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher: the wide transformer beside the tiny model's other parts."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    folder.mkdir()
    for part in ("scheduler", "text_encoder", "tokenizer", "vae", "model_index.json"):
        copy = shutil.copytree if (tiny_folder / part).is_dir() else shutil.copyfile
        copy(tiny_folder / part, folder / part)
    wide(0).save_pretrained(folder / "transformer")
    return folder


def changes(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, sides in {
        "layers.0.attention.to_k": (3840, 3840),
        "layers.1.attention.to_out.0": (3840, 3840),
        "noise_refiner.1.feed_forward.w2": (3840, 10240),
        "layers.1.adaLN_modulation.0": (15360, 256),
    }.items():
        up, down = (torch.randn(*s, generator=generator) for s in ((sides[0], 4), (4, sides[1])))
        found |= {f"{name}.lora_A.weight": 0.05 * down, f"{name}.lora_B.weight": 0.05 * up}
    return found


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "pair"
    for seed, step in enumerate(("first", "second")):
        save_lora(changes(seed), 4, folder, f"{step}.safetensors")
    write_lora_index(folder, teacher=(str(base), None), schedule=SCHEDULE)
    return folder


def in_comfyui(exported: Path, embeds: Tensor) -> dict[str, Tensor]:
    path = exported / "workflow-api.json"
    nodes = json.loads(path.read_text(encoding="utf-8"))
    for node in nodes.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"] |= {"width": SIDE, "height": SIDE}
    path.write_text(json.dumps(nodes), encoding="utf-8")
    save_file({"embeds": embeds[None]}, exported / "embeds.safetensors")
    script = Path(__file__).with_name("in_comfyui.py")
    call = [PYTHON, script, COMFYUI, exported, exported / "embeds.safetensors", exported / "out"]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lora key not loaded" not in done.stdout + done.stderr
    return load_file(exported / "out")


@torch.no_grad()
def ours(steps: list[Callable[[], Any]], embeds: Tensor, noise: Tensor) -> Tensor:
    """In fp32, one transformer in memory at a time."""
    prompts = PromptBatch.collate([embeds])
    as_velocity = FAMILIES["ZImageTransformer2DModel"].as_velocity
    between = first_step(bind(as_velocity(steps[0]().float()), prompts), noise, SCHEDULE)
    gc.collect()
    second = bind(as_velocity(steps[1]().float()), prompts)
    return second_step(second, between.latents2, SCHEDULE)


EMBEDS = torch.randn(20, 2560, generator=torch.Generator().manual_seed(9))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the values' spread."""
    return ((found - wanted).norm() / wanted.norm()).item()


def test_two_whole_transformers(tiny_folder: Path, base: Path, tmp_path: Path) -> None:
    write_student(base, (wide(s) for s in (1, 2)), schedule=SCHEDULE, folder=tmp_path / "student")
    student = ModelFolder.open(tmp_path / "student")
    assert export_comfyui(student, tmp_path / "plain")[1:] == []
    found = in_comfyui(tmp_path / "plain", EMBEDS)
    assert found["sigmas"].tolist() == [1.0, 0.75, 0.0]
    wanted = ours([partial(wide, 1), partial(wide, 2)], EMBEDS, found["noise"])
    assert distance(found["latents"], wanted) < 1e-3


@pytest.mark.parametrize(("packing", "bound"), [(None, 1e-3), ("fp8", 0.05), ("int8", 0.02)])
def test_two_loras_on_one_transformer(
    packing: Any, bound: float, pair: Path, tmp_path: Path
) -> None:
    student = ModelFolder.open(pair)
    export_comfyui(student, tmp_path / "out", packing=packing)
    found = in_comfyui(tmp_path / "out", EMBEDS)
    stored = student.stored_transformer
    steps = [partial(stored, part, torch.float32) for part in ("transformer", "transformer_2")]
    wanted = ours(steps, EMBEDS, found["noise"])
    assert distance(found["latents"], wanted) < bound
    if packing is None:  # without the LoRAs it is another picture
        plain = ours([partial(wide, 0)] * 2, EMBEDS, found["noise"])
        assert distance(plain, wanted) > 0.1
