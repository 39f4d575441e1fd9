"""ComfyUI's workflow of the two steps: as the API takes it, and as the page lays it out.

The second sampler starts where the first one stopped, noise left over included; with the `simple`
scheduler and this shift the two steps are at sigma 1 and shift / (1 + shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Nodes = dict[str, dict[str, Any]]

# What the page needs to know of a node: links in by name and type, link out, and its widgets in
# order (nodes.py of ComfyUI 0.33); after a seed the page keeps what becomes of it.
_AFTER = "control_after_generate"
_KINDS: dict[str, tuple[dict[str, str], str, tuple[str, ...]]] = {
    "UNETLoader": ({}, "MODEL", ("unet_name", "weight_dtype")),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, "MODEL", ("lora_name", "strength_model")),
    "ModelSamplingAuraFlow": ({"model": "MODEL"}, "MODEL", ("shift",)),
    "CLIPLoader": ({}, "CLIP", ("clip_name", "type", "device")),
    "CLIPTextEncode": ({"clip": "CLIP"}, "CONDITIONING", ("text",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, "CONDITIONING", ()),
    "EmptySD3LatentImage": ({}, "LATENT", ("width", "height", "batch_size")),
    "KSamplerAdvanced": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
        },
        "LATENT",
        (
            "add_noise", "noise_seed", _AFTER, "steps", "cfg", "sampler_name", "scheduler",
            "start_at_step", "end_at_step", "return_with_leftover_noise",
        ),
    ),
    "VAELoader": ({}, "VAE", ("vae_name",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, "IMAGE", ()),
    "SaveImage": ({"images": "IMAGE"}, "", ("filename_prefix",)),
}  # fmt: skip
_WIDTH, _LINE, _GAP = 320, 26, 60


def workflow(first: str, second: str, *, shift: float, side: int = 1024) -> Nodes:
    """For two whole transformers: two loaders, two samplers of one step each."""
    return _nodes(
        {
            "1": _node("UNETLoader", unet_name=first, weight_dtype="default"),
            "2": _node("UNETLoader", unet_name=second, weight_dtype="default"),
        },
        "1",
        "2",
        shift=shift,
        side=side,
    )


def lora_workflow(base: str, first: str, second: str, *, shift: float, side: int = 1024) -> Nodes:
    """For two LoRA files on one transformer, which is loaded once: half the memory."""
    loader = _node("UNETLoader", unet_name=base, weight_dtype="default")
    names = {"14": first, "15": second}
    loras = {
        key: _node("LoraLoaderModelOnly", model=["1", 0], lora_name=name, strength_model=1.0)
        for key, name in names.items()
    }
    return _nodes({"1": loader, **loras}, "14", "15", shift=shift, side=side)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _nodes(loaders: Nodes, first: str, second: str, *, shift: float, side: int) -> Nodes:
    common = {
        "noise_seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
        "positive": ["6", 0], "negative": ["7", 0],
    }  # fmt: skip
    return {
        **loaders,
        "3": _node("ModelSamplingAuraFlow", model=[first, 0], shift=shift),
        "4": _node("ModelSamplingAuraFlow", model=[second, 0], shift=shift),
        "5": _node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        "6": _node("CLIPTextEncode", clip=["5", 0], text="a red fox in the snow"),
        "7": _node("ConditioningZeroOut", conditioning=["6", 0]),
        "8": _node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "9": _node(
            "KSamplerAdvanced", model=["3", 0], latent_image=["8", 0], add_noise="enable",
            start_at_step=0, end_at_step=1, return_with_leftover_noise="enable", **common,
        ),
        "10": _node(
            "KSamplerAdvanced", model=["4", 0], latent_image=["9", 0], add_noise="disable",
            start_at_step=1, end_at_step=2, return_with_leftover_noise="disable", **common,
        ),
        "11": _node("VAELoader", vae_name="ae.safetensors"),
        "12": _node("VAEDecode", samples=["10", 0], vae=["11", 0]),
        "13": _node("SaveImage", images=["12", 0], filename_prefix="twostep"),
    }  # fmt: skip


def laid_out(nodes: Nodes) -> dict[str, Any]:
    """The same workflow in the page's own format (version 0.4): places, sizes, links by number.

    A column for each distance from the loaders, so that links go to the right.
    """
    columns: dict[str, int] = {}
    for key in nodes:
        _place(key, nodes, columns)
    ends: list[int] = [0] * (max(columns.values()) + 1)
    links: list[list[Any]] = []
    found = {}
    for order, key in enumerate(sorted(nodes, key=lambda k: (columns[k], int(k)))):
        kind, values = nodes[key]["class_type"], nodes[key]["inputs"]
        linked, output, widgets = _KINDS[kind]
        inputs = []
        for slot, (name, of_type) in enumerate(linked.items()):
            source, out_slot = values[name]
            links.append([len(links) + 1, int(source), out_slot, int(key), slot, of_type])
            inputs.append({"name": name, "type": of_type, "link": len(links)})
        height = _LINE * (2 + len(widgets) + max(len(inputs), 1))
        column = columns[key]
        found[key] = {
            "id": int(key),
            "type": kind,
            "pos": [column * (_WIDTH + _GAP), ends[column]],
            "size": [_WIDTH, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": [{"name": output, "type": output, "links": []}] if output else [],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [_widget(name, values) for name in widgets],
        }
        ends[column] += height + _GAP
    for number, source, slot, *_ in links:
        found[str(source)]["outputs"][slot]["links"].append(number)
    return {
        "last_node_id": max(map(int, nodes)),
        "last_link_id": len(links),
        "nodes": list(found.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _place(key: str, nodes: Nodes, columns: dict[str, int]) -> int:
    if key not in columns:
        sources = [v[0] for v in nodes[key]["inputs"].values() if isinstance(v, list)]
        columns[key] = 1 + max((_place(source, nodes, columns) for source in sources), default=-1)
    return columns[key]


def _widget(name: str, values: Mapping[str, Any]) -> Any:
    usual = {_AFTER: "fixed", "device": "default"}
    return values.get(name, usual.get(name))
