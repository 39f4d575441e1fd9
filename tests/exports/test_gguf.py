"""GGUF files: what gguf-py and diffusers read of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
from safetensors.torch import load_file

from tiny import random_transformer
from twostep.errors import ModelError
from twostep.exports.comfyui import to_comfyui
from twostep.exports.gguf_file import q4_k, read_gguf
from twostep.exports.registry import ExportOptions, export
from twostep.method.schedule import Schedule
from twostep.models.student import save_student

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "student"
    steps = random_transformer(1), random_transformer(2)
    save_student(tiny_folder, *steps, schedule=Schedule(3.0, 0.75), folder=folder)
    lines = export(str(folder), "gguf", folder.parent / "out", ExportOptions(weights="q4_k"))
    # Rows of 64 and 170 are no multiple of 256: the next finer types.
    assert lines[1].startswith("second.gguf: ")
    assert "20 matrices in Q5_0" in lines[1]
    export(str(folder), "gguf", folder.parent / "q8", ExportOptions())
    return folder


def test_files_hold_the_student_and_diffusers_runs_them(exported: Path) -> None:
    weights = load_file(exported / "transformer_2" / "diffusion_pytorch_model.safetensors")
    wanted = to_comfyui({key: value.float() for key, value in weights.items()})
    for name, bound in (("q8", 0.006), ("out", 0.05)):
        path = exported.parent / name / "second.gguf"
        found = read_gguf(path)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].shape == value.shape
            assert (found[key] - value).norm() <= bound * value.norm(), key
    model = ZImageTransformer2DModel.from_single_file(
        str(path.parent.parent / "q8" / "second.gguf"),
        config=str(exported),
        subfolder="transformer_2",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    whole = ZImageTransformer2DModel.from_pretrained(exported, subfolder="transformer_2")
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(8, 1, 8, 8, generator=generator)]
    call = latents, torch.tensor([0.25]), [torch.randn(5, 32, generator=generator)]
    with torch.no_grad():
        ours, theirs = (m(*call, return_dict=False)[0][0] for m in (model, whole))
    assert 0 < (ours - theirs).norm() < 0.03 * theirs.norm()


def test_q4_k_is_read_by_gguf_as_it_was_meant() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0.1, 1, (6, 512)).astype(np.float32)
    values[0] = 0
    values[1, :256] = 3.5
    values[2] = np.abs(values[2])
    data = q4_k(values)
    assert data.shape == (6, 288)
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K)
    assert not back[0].any()
    np.testing.assert_allclose(back[1, :256], 3.5, rtol=0.02)
    # Half a step of 15 between a block's ends, and a little for the 6-bit scales.
    blocks = values.reshape(-1, 32)
    spread = np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)
    error = np.abs(back.reshape(-1, 32) - blocks).max(1)
    assert (error <= spread * (0.5 / 15 + 0.03) + 1e-6).all()
    norms = np.linalg.norm(back - values) / np.linalg.norm(values)
    assert 0.02 < norms < 0.09


def test_weights_that_a_format_has_not(exported: Path, tmp_path: Path) -> None:
    for target, weights, known in (
        ("gguf", "fp8", "q8_0 or q4_k"),
        ("comfyui", "q8_0", "fp8 or int8"),
        ("lora", "int8", "none: it is for comfyui and gguf"),
    ):
        with pytest.raises(ModelError, match=f"weights: for {target} expected {known}, got"):
            export(str(exported), target, tmp_path / "out", ExportOptions(weights=weights))
