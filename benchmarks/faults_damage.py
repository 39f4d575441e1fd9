"""Cases of `faults.py`: every kind of file that is read, damaged in every way; numbers that are none."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import Case
from faults_world import EVALUATE, SMALL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

Damage = Callable[[Path, random.Random], object]
GENERATE = ["generate", "--size", "32", "--out", "new", "a dog", "two cats"]


def _bytes(change: Callable[[bytearray, random.Random], object]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        content = bytearray(path.read_bytes())
        change(content, draw)
        path.write_bytes(content)

    return damage


def _flip(content: bytearray, draw: random.Random, low: float = 0.0, high: float = 1.0) -> None:
    place = min(len(content) - 1, int(len(content) * draw.uniform(low, high)))
    content[place] ^= 1 << draw.randrange(8)


def _cut(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def _zeros(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))


def _replace(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


ANY: dict[str, Damage] = {
    "gone": _replace(lambda p: None),
    "empty": lambda p, _: p.write_bytes(b""),
    "cut": _bytes(_cut),
    "one byte short": _bytes(lambda c, _: c.pop()),
    "one byte more": _bytes(lambda c, _: c.append(0)),
    "a bit": _bytes(_flip),
    "a bit near the start": _bytes(lambda c, d: _flip(c, d, high=0.02)),
    "zeros": _bytes(_zeros),
    "noise": lambda p, d: p.write_bytes(d.randbytes(300)),
    "a folder": _replace(lambda p: p.mkdir()),
    "a link to itself": _replace(lambda p: p.symlink_to(p.name)),
    "an endless device": _replace(lambda p: p.symlink_to("/dev/zero")),
    "a pipe": _replace(os.mkfifo),
}
_VALUES: list[Any] = [
    None,
    "x",
    -1,
    0,
    7,
    1e308,
    math.nan,
    [],
    {},
    [1, "a"],
    True,
    "../../x",
    10**30,
]


def _json(change: Callable[[Any, random.Random], Any]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
        lines[0] = json.dumps(change(json.loads(lines[0]), draw))
        path.write_text("\n".join(lines))

    return damage


def _other_value(values: Any, draw: random.Random) -> Any:
    place = values
    while isinstance(place, dict) and place:
        key = draw.choice(list(place))
        if isinstance(place[key], dict) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        place[key] = draw.choice(_VALUES)
        break
    return values


def _without_a_key(values: Any, draw: random.Random) -> Any:
    if isinstance(values, dict) and values:
        del values[draw.choice(list(values))]
    return values


JSON: dict[str, Damage] = {
    "a list": lambda p, _: p.write_text("[]"),
    "an empty object": lambda p, _: p.write_text("{}"),
    "null": lambda p, _: p.write_text("null"),
    "deep": lambda p, _: p.write_text("[" * 100_000),
    "not utf-8": lambda p, _: p.write_bytes(b'{"a": "\xff"}'),
    "another value": _json(_other_value),
    "another value again": _json(_other_value),
    "a key gone": _json(_without_a_key),
}


def _tensors(change: Callable[[dict[str, Tensor], str, random.Random], object]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        tensors = load_file(path)
        floats = [k for k, t in tensors.items() if t.is_floating_point() and t.numel()]
        change(tensors, draw.choice(sorted(floats or tensors)), draw)
        save_file(tensors, path, {"format": "pt"})

    return damage


def _fill(value: float) -> Damage:
    def change(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
        if not tensors[key].is_floating_point():
            tensors[key] = tensors[key].float()
        tensors[key].view(-1)[draw.randrange(tensors[key].numel())] = value

    return _tensors(change)


TENSORS: dict[str, Damage] = {
    "nan": _fill(math.nan),
    "infinity": _fill(math.inf),
    "a tensor gone": _tensors(lambda t, k, _: t.pop(k)),
    "a tensor renamed": _tensors(lambda t, k, _: t.update({k + "x": t.pop(k)})),
    "another shape": _tensors(lambda t, k, _: t.update({k: t[k].reshape(-1)[:-1].clone()})),
    "integers": _tensors(lambda t, k, _: t.update({k: t[k].to(torch.int64)})),
    "no tensors": lambda p, _: save_file({}, p),
}


def _same_pictures(here: Path, code: int) -> str | None:
    """Success over damage must be success: the same pictures as of the sound files."""
    if code:
        return None
    for path in sorted((here / "pictures").glob("*steps.png")):
        found = here / "new" / path.name
        if not found.exists():
            return f"silent: {path.name} is missing"
        with Image.open(path) as wanted, Image.open(found) as got:
            if wanted.tobytes() != got.tobytes():
                return "silent: another picture"
    return None


def _same_student(here: Path, code: int) -> str | None:
    if code:
        return None
    for part in ("transformer", "transformer_2"):
        name = f"student/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = (load_file(here / run / name) for run in ("run", "resumed/run"))
        if any(not torch.equal(ours[key], theirs[key]) for key in theirs):
            return "silent: another student"
    return None


def _same_figures(here: Path, code: int) -> str | None:
    if code:
        return None
    found = json.loads((here / "checked/metrics.json").read_text())
    wanted = json.loads((here / ".wanted.json").read_text())
    for key in ("models", "entries", "figures", "metrics"):
        if key in wanted and _without_times(found[key]) != _without_times(wanted[key]):
            return "silent: other figures"
    return None


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if "second" not in k and "time" not in k and "latency" not in k}  # fmt: skip
    return [_without_times(v) for v in value] if isinstance(value, list) else value


# What is damaged: the folder, the command that reads it, what else it needs, the comparison.
Area = tuple[str, list[str], tuple[str, ...], Callable[[Path, int], str | None] | None]
_RESUME = ["distill", *SMALL, "training.turns=3"]
AREAS: list[Area] = [
    ("run/student", [*GENERATE, "--model", "run/student"], ("run", "pictures"), _same_pictures),
    ("pair", [*GENERATE, "--model", "pair"], ("pair", "teacher"), None),
    ("teacher", [*GENERATE, "--model", "teacher", "--steps", "1"], ("teacher",), None),
    ("teacher", ["teach", *SMALL, "data.cache=other"], ("teacher",), None),
    ("cache", _RESUME, ("teacher", "cache", "run", "resumed"), _same_student),
    ("run/checkpoints", _RESUME, ("teacher", "cache", "run", "resumed"), _same_student),
    ("run/best", [*_RESUME[:-1]], ("teacher", "cache", "run"), None),
    ("run/frozen", _RESUME, ("teacher", "cache", "run", "resumed"), _same_student),
    ("run", _RESUME, ("teacher", "cache", "run", "resumed"), _same_student),
    ("checked", EVALUATE, ("teacher", "run", "checked"), _same_figures),
    (
        "prompts",
        [*GENERATE, "--model", "run/student", "--prompt-cache", "prompts"],
        ("run", "prompts", "pictures"),
        _same_pictures,
    ),
    (
        "pictures",
        ["generate", "--model", "run/student", "--size", "32", "--out", "pictures", "--grid", "a dog", "two cats"],
        ("run", "pictures"),
        None,
    ),
    ("run/student", ["check", "run/student"], ("run",), None),
    ("cache", ["check", "cache"], ("cache",), None),
    ("run", ["check", "run"], ("run", "teacher", "cache"), None),
    ("pair", ["average", "pair", "pair", "--out", "new"], ("pair", "teacher"), None),
    ("run/student", ["export", "--model", "run/student", "--to", "comfyui", "--out", "new"], ("run",), None),
]  # fmt: skip


def _ways(path: Path) -> dict[str, Damage]:
    if path.suffix in (".json", ".jsonl"):
        return ANY | JSON
    return ANY | TENSORS if path.suffix == ".safetensors" else ANY


def _case(area: Area, path: Path, way: str, seed: int) -> Case:
    folder, command, needs, compare = area
    damage = _ways(path)[way]

    def spoil(here: Path) -> None:
        if folder == "checked":
            shutil.copyfile(here / "checked/metrics.json", here / ".wanted.json")
        damage(here / path, random.Random(seed))

    return Case(
        f"damage: {command[0]}", f"{path}: {way}", command, spoil, needs=needs,
        finish=compare or (lambda _, __: None),
        refused=command[0] == "check" and way in ("a bit", "cut", "noise") and path.suffix == ".safetensors",
        names=(path.name, path.parent.name, str(path.parent), folder),
    )  # fmt: skip


def cases(world: Path, draw: random.Random) -> list[Case]:
    pool: list[Case] = []
    for area in AREAS:
        folder = world / area[0]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".md", ".py", ".html", ".lock", "")]  # fmt: skip
        some = []
        for path in files:
            if area[0] == "run" and path.relative_to(folder).parts[0] in ("student", "samples"):
                continue
            some += [
                _case(area, path.relative_to(world), way, draw.randrange(2**30))
                for way in _ways(path)
            ]
        pool += draw.sample(some, min(16, len(some)))
    return pool + _not_numbers(world, draw)


def _not_numbers(world: Path, draw: random.Random) -> list[Case]:
    """NaN, infinity and absurd values in whole tensors, by every command that reads them."""
    weights = {
        "transformer": "transformer/diffusion_pytorch_model.safetensors",
        "text encoder": "text_encoder/model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
    }
    commands: dict[str, list[str]] = {
        "generate": [*GENERATE, "--model", "M", "--steps", "1"],
        "teach": ["teach", *SMALL, "teacher.model=M", "data.cache=other"],
        "evaluate": ["evaluate", "--model", "M", "--reference", "teacher", "--out", "other", "--images", "4", "--size", "32", "--steps", "2", "--reference-steps", "2", "--halves", "2"],
        "compare": ["compare", "M@1", "--prompt", "a dog", "--size", "32"],
        "plan": ["distill", "--dry-run", *SMALL, "teacher.model=M", "data.cache=other"],
        "check": ["check", "M"],
    }  # fmt: skip
    found = []
    for part, file in weights.items():
        for value in (math.nan, -math.inf, 1e30):
            for name, command in commands.items():

                def poison(here: Path, file: str = file, value: float = value) -> None:
                    shutil.copytree(here / "teacher", here / "M")
                    tensors = load_file(here / "M" / file)
                    key = sorted(k for k in tensors if tensors[k].ndim > 1)[0]
                    tensors[key] = tensors[key].clone().fill_(value)
                    save_file(tensors, here / "M" / file, {"format": "pt"})

                reads = not (part == "vae" and name == "teach") and name != "plan"
                found.append(
                    Case("not a number", f"{part} {value} {name}", command, poison, needs=("teacher",),
                         refused=reads and not math.isclose(value, 1e30), names=("M",))
                )  # fmt: skip
    return found
