"""The wheel works where no checkout is: its recipes, its models, its commands."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    (copy / "src").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src" / "twostep", copy / "src" / "twostep", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", str(folder), str(copy), cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment: the wheel in it, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    own = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(own)
    # After the wheel's own folder, so that it is found before an editable checkout.
    (own / "needs.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"


def test_what_ships_has_its_licence_and_what_need_not_ship_does_not(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "zoo/recipes/emoji-demo.yaml", "recipe/recipe.schema.json", "data/prompt_sets/parti.tsv",
        "evaluation/report/report.html", "planning/configurations/z-image-turbo/vae/config.json",
    ):  # fmt: skip
        assert f"twostep/{part}" in names
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE-parti", "emojibase-data.txt", "fluent-emoji.txt"}
    assert not any("zoo/emoji-base" in name for name in names)
    assert wheel.stat().st_size < 20e6


def test_it_runs_in_a_folder_of_its_own(python: Path, tmp_path: Path) -> None:
    twostep = (str(python), "-m", "twostep")
    where = run(str(python), "-c", "import twostep; print(twostep.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert "zoo:z-image-turbo-lora: " in run(*twostep, "recipes", cwd=tmp_path)
    run(*twostep, "generate", "a dog", "--model", "zoo:emoji-student", cwd=tmp_path)
    assert len(list((tmp_path / "runs" / "pictures").glob("*.png"))) == 1
    run(
        *twostep, "distill", "zoo:emoji-demo", "training.turns=10", "losses.warmup_turns=4",
        "data.prompt_count=24", "data.samples_per_prompt=1", "training.batch_size=4",
        "training.validation_samples=8", "training.critic_warmup_turns=2", cwd=tmp_path,
    )  # fmt: skip
    run_folder = tmp_path / "runs" / "emoji-demo"
    assert (run_folder / "student" / "transformer_2").is_dir()
    assert '"commit": "unknown"' in (run_folder / "run.json").read_text()
