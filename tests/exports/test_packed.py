"""Weights in 8 bits in ComfyUI's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tiny import random_transformer
from twostep.exports.comfyui import to_comfyui
from twostep.exports.packed import pack, unpack
from twostep.exports.registry import ExportOptions, export
from twostep.method.schedule import Schedule
from twostep.models.student import save_student


def packed_names(weights: dict[str, torch.Tensor]) -> set[str]:
    return {name.removesuffix("_scale") for name in weights if name.endswith("weight_scale")}


@pytest.mark.parametrize(("packing", "bound"), [("fp8", 0.036), ("int8", 0.01)])
def test_blocks_matrices_are_packed_and_the_rest_is_as_it_was(packing: str, bound: float) -> None:
    weights = to_comfyui(random_transformer().state_dict())
    found, header = pack(weights, packing)
    names = packed_names(found)
    # qkv, out and three of the feed-forward, in each of 3 + 1 + 1 blocks.
    assert len(names) == 25
    layers = json.loads(header)["layers"]
    assert {f"{layer}.weight" for layer in layers} == names
    back = unpack(found, torch.float32)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        error = (back[name] - weight).norm() / weight.norm()
        assert (0 < error < bound) if name in names else error == 0, name
    # The largest value of a matrix (fp8) or of a row (int8) is kept to its last bit but few.
    name = "layers.0.feed_forward.w2.weight"
    assert found[name].element_size() == 1
    largest = weights[name].abs().amax(1), back[name].abs().amax(1)
    if packing == "int8":
        torch.testing.assert_close(*largest)
        assert found[f"{name}_scale"].shape == (64, 1)
    else:
        assert largest[1].max() == pytest.approx(largest[0].max().item(), rel=1e-6)
        assert found[f"{name}_scale"].shape == ()


def test_export_to_comfyui_in_8_bits(tiny_folder: Path, tmp_path: Path) -> None:
    steps = random_transformer(1), random_transformer(2)
    folder = tmp_path / "student"
    save_student(tiny_folder, *steps, schedule=Schedule(3.0, 0.75), folder=folder)
    export(str(folder), "comfyui", tmp_path / "out", ExportOptions(weights="fp8"))
    path = tmp_path / "out" / "second.safetensors"
    assert len(packed_names(load_file(path))) == 25
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["_quantization_metadata"])
    assert header["format_version"] == "1.0"
    assert header["layers"]["layers.0.attention.qkv"]["format"] == "float8_e4m3fn"
