"""YAML that a stranger may have written: plain values, each key once, within limits."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from twostep.errors import RecipeError
from twostep.zoo import recipe_names

_MOST_BYTES = 1 << 20
_MOST_NODES = 20_000
_MOST_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Refuses aliases, which may stand for gigabytes, keys given twice, and what is too much."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.nodes = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _error("an alias (*name); write the value out", self.peek_event())
        self.nodes += 1
        self.depth += 1
        if self.nodes > _MOST_NODES or self.depth > _MOST_DEPTH:
            raise _error("more values, or deeper ones, than a recipe has", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", ""))[:200]
            if name in seen:
                raise _error(f"the key {name!r} a second time", key)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _OverrideLoader(_Loader):
    """YAML 1.1 reads 1e-4 as a string; people who type it mean a number."""


_OverrideLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _error(what: str, where: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"found {what}", problem_mark=where.start_mark)


def read_file(path: Path) -> Any:
    """The values in a file.

    Raises:
        RecipeError: naming the file, for one that is missing, too large, or not such YAML.
    """
    try:
        state = path.stat()
    except (OSError, ValueError):
        hint = f"; did you mean zoo:{path}?" if str(path) in recipe_names() else ""
        raise RecipeError(f"no recipe at {path}{hint} (from {Path.cwd()})") from None
    if not stat.S_ISREG(state.st_mode):
        raise RecipeError(f"no recipe at {path}: it is no ordinary file")
    if state.st_size > _MOST_BYTES:
        raise RecipeError(f"{path} has {state.st_size} bytes, a recipe at most {_MOST_BYTES}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from error
    return _parsed(text, _Loader, str(path))


def read_value(text: str, override: str) -> Any:
    """The value of an override.

    Raises:
        RecipeError: naming the override.
    """
    return _parsed(text, _OverrideLoader, f"override {short(override)}: the value")


def _parsed(text: str, loader: type[_Loader], what: str) -> Any:
    try:
        return yaml.load(text, Loader=loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        said = " ".join(str(error).split())[:400]
        raise RecipeError(f"{what} is not valid YAML: {said}") from error


def short(value: Any, limit: int = 200) -> str:
    """A value for a message."""
    if isinstance(value, dict | list | tuple | set) and len(value) > 20:
        return f"{len(value)} values"
    if isinstance(value, int) and abs(value) >= 10**50:
        return "a number of more than 50 digits"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
