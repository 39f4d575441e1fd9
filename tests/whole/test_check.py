"""`twostep check`, and what opening a damaged folder says, for each kind of folder and damage."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.data.cache.build import open_cache
from twostep.data.cache.read import TeacherCache
from twostep.distill.soundness import UnsoundError, check
from twostep.distill.trainer import Trainer
from twostep.errors import InputError, ModelError, UserError
from twostep.models.folder import ModelFolder
from twostep.models.prompt_store import PromptStore
from twostep.recipe.schema import Recipe
from twostep.runtime import checksums
from twostep.runtime.checked_tensors import DamagedError, load_checked

FIRST = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its cache and a run of two turns."""
    here = tmp_path_factory.mktemp("whole")
    values = {
        "name": "run",
        "teacher": {"model": str(tiny_folder), "steps": 2},
        "data": {"prompt_count": 8, "height": 32, "width": 32, "cache": str(here / "cache")},
        "losses": {"warmup_turns": 2},
        "critic": {"layers": [0], "width": 8},
        "training": {
            "turns": 2, "batch_size": 2, "validation_samples": 4, "autocast": False,
            "device": "cpu",
        },
        "output": str(here),
    }  # fmt: skip
    recipe = Recipe.parse(values)
    Trainer(recipe, open_cache(recipe)).train()
    return here


def test_sound_folders(whole: Path, tiny_folder: Path) -> None:
    assert check(tiny_folder) == [
        f"{tiny_folder}: a sound teacher, 3 files of weights, it has no checksums"
    ]
    (line,) = check(whole / "run" / "student")
    assert line.endswith("a sound student, 4 files of weights, checksums hold")
    (line,) = check(whole / "cache")
    assert line.endswith("a sound cache, 8 samples in 1 files")
    lines = check(whole / "run")
    assert "a sound run, 2 folders of weights" in lines[0]
    assert "records, 0 torn lines" in lines[1]
    assert "a sound student" in lines[2]
    with pytest.raises(InputError, match="holds no model"):
        check(whole)


def flip(path: Path) -> None:
    """One bit, far from header and end."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def poison(path: Path) -> None:
    tensors = load_file(path)
    next(iter(t for t in tensors.values() if t.is_floating_point())).view(-1)[0] = math.nan
    save_file(tensors, path)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "student: a bit of step 1": ("run/student", lambda f: flip(f / FIRST), "not as it was written"),
    "student: a bit of the VAE": (
        "run/student",
        lambda f: flip(f / "vae/diffusion_pytorch_model.safetensors"),
        "not as it was written",
    ),
    "student: sigma": (
        "run/student",
        lambda f: edit(f / "model_index.json", step2_sigma=0.5),
        "model_index.json is not as it was written",
    ),
    "student: cut": ("run/student", lambda f: os.truncate(f / FIRST, 50_000), "is cut short"),
    "student: a file gone": ("run/student", lambda f: (f / FIRST).unlink(), "is missing"),
    "cache: a bit": ("cache", lambda f: flip(f / "shard-00000.safetensors"), "not as it was written"),
    "cache: a record": ("cache", lambda f: (f / "shard-00000.json").unlink(), "00000.json is missing"),
    "cache: the empty prompt": ("cache", lambda f: poison(f / "empty.safetensors"), "not finite"),
    "cache: no manifest": (
        "cache",
        lambda f: (f / "manifest.json").write_text("[]"),
        "is not a manifest",
    ),
    "run: a bit of best": (
        "run",
        lambda f: flip(f / "best/weights.safetensors"),
        "weights.safetensors is not as it was written",
    ),
    "run: a bit of a checkpoint": (
        "run",
        lambda f: flip(f / "checkpoints/turn-0000002/state.safetensors"),
        "state.safetensors is not as it was written",
    ),
    "run: best of an earlier version": (
        "run",
        lambda f: ((f / "best/sums.json").unlink(), poison(f / "best/weights.safetensors")),
        "not finite",
    ),
    "run: best cut": (
        "run",
        lambda f: os.truncate(f / "best/weights.safetensors", 99),
        "not as it was written",
    ),
    "run: best gone": (
        "run",
        lambda f: (f / "best/weights.safetensors").unlink(),
        r"weights\.safetensors is missing; sums\.json",
    ),
    "run: a pipe": (
        "run",
        lambda f: (
            (f / "best/weights.safetensors").unlink(), os.mkfifo(f / "best/weights.safetensors"),
        ),
        "is no ordinary file",
    ),
    "run: recipe": ("run", lambda f: (f / "recipe.yaml").write_text("a: [1"), "not valid YAML"),
    "run: state": (
        "run",
        lambda f: (f / "checkpoints/turn-0000002/state.json").write_text("{"),
        "state.json is not as it was written",
    ),
    "run: checkpoint": (
        "run",
        lambda f: os.truncate(f / "checkpoints/turn-0000002/state.safetensors", 4000),
        "not as it was written",
    ),
    "run: its student": ("run", lambda f: flip(f / "student" / FIRST), "not as it was written"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, whole: Path, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[case]
    folder = tmp_path / "copy"
    shutil.copytree(whole / name, folder)
    check(folder)
    damage(folder)
    with pytest.raises(UnsoundError, match=message) as error:
        check(folder)
    assert error.value.exit_code == 1
    assert str(folder) in str(error.value)
    if name == "run/student":
        with pytest.raises(ModelError, match=message):
            ModelFolder.open(folder)


VALUES: dict[str, tuple[str, dict[str, object], str]] = {
    "sigma 7": ("model_index.json", {"step2_sigma": 7}, "step2_sigma must be above 0 and below 1"),
    "sigma 0": ("model_index.json", {"step2_sigma": 0}, "step2_sigma must be above 0 and below 1"),
    "sigma a word": ("model_index.json", {"step2_sigma": "x"}, "model_index.json"),
    "another step 2": ("transformer_2/config.json", {"n_layers": 1}, "transformers differ"),
    "scaling 0": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor must be a number"),
    "scaling nan": ("vae/config.json", {"scaling_factor": math.nan}, "scaling_factor must be"),
    "shift -1": ("scheduler/scheduler_config.json", {"shift": -1.0}, "shift must be a number"),
    "shift a word": ("scheduler/scheduler_config.json", {"shift": "\x1b"}, r"got '\\x1b'"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_are_validated(case: str, whole: Path, tmp_path: Path) -> None:
    """Of a folder without checksums, as a stranger gives it."""
    name, changes, message = VALUES[case]
    folder = tmp_path / "copy"
    shutil.copytree(whole / "run/student", folder)
    (folder / "checksums.json").unlink()
    ModelFolder.open(folder)
    edit(folder / name, **changes)
    with pytest.raises(ModelError, match=message):
        ModelFolder.open(folder)


@pytest.mark.parametrize("content", ["{}", "[]", '{"transformer": ["diffusers", "x"]}'])
def test_an_empty_index_is_no_teacher(content: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "run/student", folder)
    (folder / "checksums.json").unlink()
    (folder / "model_index.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"does not name the folder's transformer_2|must hold an obj"
    ):
        ModelFolder.open(folder)
    shutil.rmtree(folder / "transformer_2")
    with pytest.raises(ModelError, match=r"does not name .*vae|must hold an object"):
        ModelFolder.open(folder)


def test_a_model_of_the_package_is_checked_by_its_name() -> None:
    result = CliRunner().invoke(app, ["check", "zoo:emoji-student"])
    assert result.exit_code == 0, result.output
    assert "a sound student, 4 files of weights" in " ".join(result.stdout.split())


def test_the_command(whole: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(whole / "run" / "student")])
    assert done.exit_code == 0
    assert "a sound student" in done.output.replace("\n", " ")
    shutil.copytree(whole / "run" / "student", tmp_path / "copy")
    flip(tmp_path / "copy" / FIRST)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "copy")])
    assert isinstance(done.exception, UnsoundError)


def test_a_cache_that_is_cut_while_it_is_read_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    """Mapped, it would be SIGBUS, and the end of the process."""
    shutil.copytree(whole / "cache", tmp_path / "cache")
    recipe = Recipe.load(whole / "run/recipe.yaml", [f"data.cache={tmp_path / 'cache'}"])
    cache = open_cache(recipe)
    sound = TeacherCache(open_cache(Recipe.load(whole / "run/recipe.yaml")).spec).read([0, 7])
    first = cache.read([0, 7])
    assert torch.equal(first.latents, sound.latents)
    assert all(map(torch.equal, first.embeds, sound.embeds))
    os.truncate(tmp_path / "cache/shard-00000.safetensors", 4096)
    with pytest.raises(UserError, match=r"00000\.safetensors was cut short while it was in use"):
        cache.read([0, 7])


def test_flipped_bits_of_what_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A cached prompt is encoded anew and named; so are an evaluation's images."""
    store = PromptStore(tmp_path, "encoder")
    embeds = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    store.write({"a dog": embeds})
    assert torch.equal(store.read(["a dog"])["a dog"], embeds)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert store.read(["a dog"]) == {}
    assert f"{path} is not as it was written" in capsys.readouterr().err
    with pytest.raises(DamagedError, match="its checksum is another one"):
        load_checked(path)
    checksums.set_verifying(False)
    try:
        assert not torch.equal(store.read(["a dog"])["a dog"], embeds)
    finally:
        checksums.set_verifying(True)
