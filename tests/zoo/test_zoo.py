"""Models of the package as whole folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twostep import zoo
from twostep.errors import ModelError
from twostep.models.locate import locate
from twostep.runtime.checksums import folder_fingerprint
from twostep.zoo import ZOO, zoo_folder

# Of whole files, which caches name; whichever way the folder was made.
FINGERPRINTS = {
    "emoji-teacher": "e5d7642dc9ed65808178de5118b7434387c201a1c25cf986bbe275d412a904c9",
    "emoji-student": "b3fa5c1d2c90314909231be4758577b6dda8fbc332d722c9431b2af73b78221c",
    "emoji-base": "e192075870fbbba68bd70b0a1015a591528f0aeae0c2e39ea8b2a7b78aa3c0d4",
}
PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "twostep"


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_folder_is_whole_and_the_same_as_ever(name: str, home: Path) -> None:
    folder = locate(f"zoo:{name}")
    assert folder.is_relative_to(home)
    assert folder.name == name
    assert folder_fingerprint(folder) == FINGERPRINTS[name]
    assert (folder / "vae" / "config.json").resolve() == ZOO / "emoji-parts/vae/config.json"
    assert zoo_folder(name) == folder
    assert [p.name for p in home.glob("*/*")] == [name]  # nothing half made is left


def test_it_is_made_of_copies_where_there_are_no_links(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = zoo_folder("emoji-student")
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    assert folder_fingerprint(folder) == FINGERPRINTS["emoji-student"]


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_folder_is_made_again(damage: str, home: Path) -> None:
    folder = zoo_folder("emoji-teacher")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    if damage == "cut short":
        weights.write_bytes(b"half")
    assert zoo_folder("emoji-teacher") == folder
    assert folder_fingerprint(folder) == FINGERPRINTS["emoji-teacher"]
    assert [p.name for p in home.glob("*/*")] == ["emoji-teacher"]


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = zoo_folder("emoji-teacher")
    assert not folder.is_relative_to(tmp_path)
    assert folder_fingerprint(folder) == FINGERPRINTS["emoji-teacher"]


def test_several_processes_at_once(home: Path) -> None:
    code = (
        "import time; from twostep.zoo import zoo_folder; time.sleep(max(0, {at} - time.time()));"
        "print(zoo_folder('emoji-student'))"
    )
    at = time.time() + 1.5
    command = [sys.executable, "-c", code.format(at=at)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(6)
    ]
    found = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 6
    assert found == {str(zoo_folder("emoji-student"))}
    assert [p.name for p in home.glob("*/*")] == ["emoji-student"]


def test_other_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert zoo_folder("emoji-tiny-decoder") == ZOO / "emoji-tiny-decoder"
    for name in ("none", "emoji-parts", "../zoo", ""):
        with pytest.raises(ModelError, match="in the package; there are: zoo:emoji-base, zoo:"):
            zoo_folder(name)
    monkeypatch.setattr(zoo, "ZOO", tmp_path)  # as the wheel has it
    with pytest.raises(ModelError, match="'zoo:emoji-base' is not in the installed package"):
        zoo_folder("zoo:emoji-base")


def test_what_models_share_lies_once() -> None:
    for name in zoo.model_names():
        assert not [part for part in PARTS if (ZOO / name / part).exists()]
