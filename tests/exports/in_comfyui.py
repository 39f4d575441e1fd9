"""Runs an exported workflow-api.json by ComfyUI's own nodes, on a CPU and without its text encoder.

python in_comfyui.py COMFYUI EXPORTED EMBEDS OUT: EMBEDS has `embeds` (1, tokens, D) in place of the
prompt's; OUT gets `latents`, as the model has them, and `noise`, what the first sampler began with.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """What ComfyUI imports for other models than this one, where it is not installed."""

    names = ("torchvision", "torchaudio", "kornia", "spandrel")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main(comfyui: str, exported: str, embeds: str, out: str) -> None:
    sys.path.insert(0, comfyui)
    sys.meta_path.append(_Stubs())
    sys.argv = ["main.py", "--cpu", "--force-fp32"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy_extras.nodes_model_advanced as advanced
    import folder_paths
    import nodes
    import torch
    from safetensors.torch import load_file, save_file

    for kind in ("diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, exported)
    conditioning = [[load_file(embeds)["embeds"], {}]]
    workflow = json.loads((Path(exported) / "workflow-api.json").read_text(encoding="utf-8"))
    classes = nodes.NODE_CLASS_MAPPINGS | advanced.NODE_CLASS_MAPPINGS
    results: dict[str, tuple] = {}

    def run(key: str) -> tuple:
        if key in results:
            return results[key]
        node = workflow[key]
        kind = node["class_type"]
        if kind in ("CLIPTextEncode", "ConditioningZeroOut"):
            return (conditioning,)
        if kind == "EmptySD3LatentImage":
            sides = node["inputs"]["height"] // 8, node["inputs"]["width"] // 8
            return ({"samples": torch.zeros(1, 16, *sides)},)
        values = {
            name: run(value[0])[value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        made = classes[kind]()
        results[key] = getattr(made, made.FUNCTION)(**values)
        return results[key]

    with torch.no_grad():
        (last,) = [k for k, n in workflow.items() if n["class_type"] == "VAEDecode"]
        sampler = workflow[last]["inputs"]["samples"][0]
        model = run(workflow[sampler]["inputs"]["model"][0])[0]
        latents = run(sampler)[0]["samples"]
    sigmas = model.get_model_object("model_sampling").sigmas
    save_file(
        {
            "latents": model.model.latent_format.process_in(latents).contiguous().float(),
            "noise": comfy.sample.prepare_noise(torch.zeros_like(latents), 0).contiguous(),
            "sigmas": comfy.samplers.calculate_sigmas(
                model.get_model_object("model_sampling"), "simple", 2
            ),
        },
        out,
    )
    assert sigmas is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
