from __future__ import annotations

import os
from pathlib import Path

import pytest

from twostep.errors import ModelError
from twostep.runtime import checksums
from twostep.runtime.checksums import folder_fingerprint, verify, write_checksums


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    checksums._known.cache_clear()
    yield
    checksums._known.cache_clear()


def model(folder: Path) -> Path:
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "part" / "x.safetensors").write_bytes(bytes(9 << 20))
    return folder


def test_what_was_read_is_remembered_and_a_change_in_the_middle_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sketch of the first and last MiB took such models for the same."""
    folder = model(tmp_path / "m")
    path = folder / "part" / "x.safetensors"
    before, state = folder_fingerprint(folder), path.stat()
    checksums._known.cache_clear()  # another process
    with monkeypatch.context() as patch:
        read = checksums._read
        patch.setattr(checksums, "_read", lambda p: pytest.fail("read") if p == path else read(p))
        assert folder_fingerprint(folder) == before
    with path.open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # times may be made up
    assert folder_fingerprint(folder) != before


def test_weights_behind_a_link_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = folder_fingerprint(folder)
    (folder / "part").rename(tmp_path / "elsewhere")
    (folder / "part").symlink_to(tmp_path / "elsewhere")
    assert folder_fingerprint(folder) == before
    (tmp_path / "elsewhere" / "x.safetensors").write_bytes(b"other")
    assert folder_fingerprint(folder) != before
    (folder / "loop").symlink_to(folder)
    assert folder_fingerprint(folder) == folder_fingerprint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is not as it was written"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "checksums.json").write_text("{"), "lists no checksums"),
        (lambda f: (f / "checksums.json").write_text('{"sha256": [1]}'), "lists no checksums"),
        (
            lambda f: (f / "checksums.json").write_text('{"sha256": {"../x": "0"}}'),
            "outside the folder",
        ),
        (lambda f: (f / "checksums.json").write_text('{"sha256": {"/x": "0"}}'), "outside"),
    ],
)
def test_a_changed_folder_is_refused(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = model(tmp_path / "m")
    assert not verify(folder)
    write_checksums(folder)
    assert verify(folder)
    (folder / "README.md").write_text("added")  # more may be there
    assert verify(folder)
    change(folder)
    with pytest.raises(ModelError, match=message):
        verify(folder)
    checksums.set_verifying(False)
    try:
        assert not verify(folder)
    finally:
        checksums.set_verifying(True)
