"""The wheel, installed by itself, does what the checkout does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MEGABYTES = 16  # 15.7 now
LICENCES = {
    "LICENSE",
    "src/twostep/data/prompt_sets/LICENSE-parti",
    "src/twostep/zoo/LICENSES/emojibase-data.txt",
    "src/twostep/zoo/LICENSES/fluent-emoji.txt",
}
DATA = {
    "data/prompt_sets/parti.tsv", "evaluation/report/report.html", "py.typed",
    "planning/configurations/z-image-turbo/transformer/config.json", "recipe/recipe.schema.json",
    "zoo/emoji-parts/tokenizer/tokenizer.json", "zoo/emoji-student/pipeline.py",
    "serving/page/index.html", "serving/page/page.js", "zoo/inspector/inspector.safetensors", "zoo/recipes/z-image-turbo-full.yaml",
}  # fmt: skip


def call(*command: str | Path, folder: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=kept | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pip")
    source = tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    here = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here]
    call(*command, "--wheel-dir", source / "dist", source, folder=source)
    (found,) = (source / "dist").glob("twostep-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel; requirements are those of this one."""
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment, folder=environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    call(*pip, "--no-deps", "--no-index", wheel, folder=environment)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", where, folder=environment).strip())
    # A folder named so comes after its own, and its .pth files (the checkout's) are not read.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "requirements.pth").write_text("".join(f"{folder}\n" for folder in sorted(here)))
    return python


@pytest.mark.slow
def test_files_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"twostep/{name}" for name in DATA} <= names
    assert {n.split("/licenses/")[1] for n in names if "/licenses/" in n} == LICENCES
    assert not [n for n in names if "emoji-base" in n or n.endswith(".pyc") or "tests" in n]
    assert wheel.stat().st_size < MEGABYTES * 1e6


@pytest.mark.slow
def test_commands_of_the_wheel_work_elsewhere(python: Path, tmp_path: Path) -> None:
    def twostep(*arguments: str) -> str:
        command = python.parent / "twostep"
        cache = str(tmp_path / "cache")
        return call(
            command, *arguments, folder=tmp_path, XDG_CACHE_HOME=cache, HF_HUB_OFFLINE="1"
        )  # fmt: skip

    found = call(python, "-c", "import twostep; print(twostep.__file__)", folder=tmp_path)
    assert Path(found.strip()).is_relative_to(python.parents[1])

    assert twostep("recipes").startswith("zoo:emoji-demo ")
    twostep("generate", "--model", "zoo:emoji-student", "a dog", "--out", "pictures")
    (picture,) = (tmp_path / "pictures").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    twostep(
        "distill", "zoo:emoji-demo", "training.turns=10", "data.prompt_count=16",
        "training.batch_size=4", "training.validation_samples=4", "losses.warmup_turns=2",
        "score.fit_turns=2", "training.critic_warmup_turns=1", "training.device=cpu",
    )  # fmt: skip
    run = tmp_path / "runs" / "emoji-demo"
    assert (run / "student" / "model_index.json").is_file()
    assert not [p for p in (run / "student").rglob("*") if p.is_symlink()]
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["commit"] == "unknown"
    twostep("generate", "--model", str(run / "student"), "a dog", "--out", "own")
    assert len(list((tmp_path / "own").glob("*.png"))) == 1

    code = "from twostep.zoo import zoo_folder, ModelError\ntry: zoo_folder('emoji-base')\nexcept ModelError as error: print(error)"
    said = call(python, "-c", code, folder=tmp_path)
    assert said.startswith("'zoo:emoji-base' is not in the installed package, only in a checkout")
