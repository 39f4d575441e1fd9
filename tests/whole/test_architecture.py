"""Imports flow one way; what runs a model needs nothing of what trains it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import twostep

PACKAGE = Path(twostep.__file__).parent
# The students of the zoo carry a copy of standalone_pipeline.py.
MODULES = [p for p in PACKAGE.rglob("*.py") if not p.match("zoo/*/pipeline.py")]

# Lowest first: a module may import from its own room and from rooms on lower floors.
FLOORS = [
    ["errors"],
    ["method", "emoji", "zoo"],
    ["runtime", "recipe"],
    ["families"],
    ["models"],
    ["inference"],
    ["data"],
    ["evaluation", "serving"],
    ["cards"],
    ["distill", "exports", "voting"],
    ["planning"],
    ["cli"],
    # Paths that students' folders and cards name, for one release more.
    ["pipeline", "sampler", "rollout", "__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports() -> list[tuple[str, str, str]]:
    edges = []
    for path in MODULES:
        unit = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if unit == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "twostep" and len(parts) > 1 and parts[1] != unit:
                    edges.append((unit, parts[1], str(path)))
    return edges


def test_every_module_is_in_a_room() -> None:
    units = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in MODULES}
    assert units - {"__init__"} == set(FLOOR)


def test_imports_never_point_upwards() -> None:
    edges = imports()
    assert len(edges) > 30
    upwards = {e[:2] for e in edges if FLOOR[e[1]] >= FLOOR[e[0]]}
    assert upwards == set()


def test_pipeline_needs_no_training_and_help_needs_no_torch() -> None:
    code = "import sys, twostep.inference.pipeline; print(sorted(m for m in sys.modules if m.startswith('twostep.')))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for unit in ("distill", "evaluation", "cli", "recipe", "data"):
        assert f"twostep.{unit}" not in loaded
    code = "import sys, twostep.cli; print('torch' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert loaded.strip() == "False"


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        text = path.read_text()
        # What a user may type, in a docstring.
        text = text.replace("from_pretrained(FOLDER, trust_remote_code=True)", "")
        if path.match("cards/scripts.py"):  # what a card's reader copies
            text = text.replace("trust_remote_code=True", "")
        if path.name == "features.py":  # a checksummed file of a package's own, tensors only
            text = text.replace('torch.load(path, map_location="cpu", weights_only=True)', "")
        text = text.replace("safetensors.torch.load(", "")
        for word in ("torch.load", "pickle", "trust_remote_code=True", "0.0.0.0"):
            assert word not in text, f"{path}: {word}"


def test_no_call_of_ours_is_a_wall_of_positions() -> None:
    """At most four, but for the table of emoji, rich's Progress and what takes any number (`*args`)."""
    definitions = [
        node
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    variadic = {d.name for d in definitions if isinstance(d, ast.FunctionDef) and d.args.vararg}
    ours = {d.name for d in definitions} - variadic - {"Emoji", "Progress", "__init__"}
    walls = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) <= 4:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ours:
                walls.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {name}")
    assert walls == []
