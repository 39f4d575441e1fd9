"""What is generated is current; what pages and packages promise is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import twostep
from twostep.cli import app
from twostep.recipe.schema import json_schema

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "twostep"
SCHEMA = PACKAGE / "recipe" / "recipe.schema.json"


def run(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_reference_schema_and_rooms_are_generated() -> None:
    run("tools/reference.py", "--check")


def test_rooms_of_the_map_are_the_folders() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- rooms: generated.*?-->(.*?)<!-- rooms: end -->", text, flags=re.S)
    assert table is not None
    rooms = re.findall(r"^\| `([^`]+)/` \|", table[1], flags=re.M)
    folders = {
        str(p.parent.relative_to(PACKAGE))
        for p in PACKAGE.rglob("__init__.py")
        if p.parent != PACKAGE
    }
    assert set(rooms) == folders
    assert len(rooms) == len(folders)


def test_tree_of_the_readme_is_the_listing() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree: generated.*?```text\n(.*?)```", text, flags=re.S)
    assert tree is not None
    named = re.findall(r"^(\w+)/ ", tree[1], flags=re.M)
    tracked = run("-c", "import subprocess; subprocess.run(['git', 'ls-files'])")
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    folders = {f for f in folders if not f.startswith(".")}
    if not folders:  # not a git checkout
        pytest.skip("needs git's list of files")
    assert set(named) | {"src"} == folders


def test_schema_is_printed_and_names_every_key() -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.stdout) == json_schema() == json.loads(SCHEMA.read_text("utf-8"))
    assert printed.stdout == SCHEMA.read_text("utf-8")
    training = json_schema()["$defs"]["Training"]
    assert training["properties"]["turns"]["minimum"] == 1
    assert training["additionalProperties"] is False
    assert json_schema()["required"] == ["name", "teacher"]


def shipped_recipes() -> list[Path]:
    return sorted((PACKAGE / "zoo" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipes_name_the_schema_for_editors(path: Path) -> None:
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    target = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert target is not None, first
    assert (path.parent / target[1]).resolve() == SCHEMA
    known = set(json_schema()["properties"])
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= known


def test_version() -> None:
    assert twostep.__version__ == version("twostep")
    printed = CliRunner().invoke(app, ["--version"])
    assert (printed.exit_code, printed.stdout) == (0, f"twostep {version('twostep')}\n")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {version('twostep')} - " in changes
    assert "\n## Unreleased\n" in changes


def test_names_at_the_top_are_loaded_when_asked_for() -> None:
    code = "import sys, twostep; twostep.Recipe, twostep.__version__; print('torch' in sys.modules)"
    assert run("-c", code).strip() == "False"
    assert {name for name in twostep.__all__ if hasattr(twostep, name)} == set(twostep.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = twostep.Nothing


def test_site_builds_strictly_and_asks_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='needs the extra: pip install ".[docs]"')
    run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "site").glob("*.html")}
    loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)', pages["index"])
    assert loaded == []
    assert "TwoStepPipeline" in pages["api"]
    assert "../src/" not in "".join(pages.values())
