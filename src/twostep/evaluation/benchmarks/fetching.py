"""A benchmark's prompt files, fetched once and checked."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from twostep.errors import InputError
from twostep.runtime.files import make_folder, write_atomically

_MOST_BYTES = 64 * 2**20
_SECONDS = 60
_HUB = "hf:"


@dataclass(frozen=True)
class Source:
    """A file of prompts, or an archive that holds them.

    Attributes:
        address: https, or `hf:OWNER/NAME/FILE`, a file of a data set on the hub.
        sha256: of the file, or of an archive's members (`digest`); None where its owner may change
            the file and nobody published a checksum.
        members: in an archive, those whose path matches.
    """

    address: str
    sha256: str | None
    members: str | None = None

    @property
    def name(self) -> str:
        """What the file is called here."""
        return self.address.rpartition("/")[2]

    @property
    def url(self) -> str:
        if not self.address.startswith(_HUB):
            return self.address
        owner, name, file = self.address.removeprefix(_HUB).split("/", 2)
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{hub}/datasets/{owner}/{name}/resolve/main/{file}"


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a single file; of several, of name, zero, content, zero in the names' order."""
    if len(files) == 1:
        return hashlib.sha256(*files.values()).hexdigest()
    found = hashlib.sha256()
    for name in sorted(files):
        found.update(name.rpartition("/")[2].encode() + b"\0" + files[name] + b"\0")
    return found.hexdigest()


def fetch(source: Source, folder: Path) -> dict[str, bytes]:
    """The files of `source` by path; kept in `folder`, where they are found the next time.

    Raises:
        InputError: if it cannot be had, is larger than 64 MiB, or is not the file that is meant.
    """
    path = folder / source.name
    kept = path.exists()
    content = path.read_bytes() if kept else _download(source.url)
    files = _members(content, source, path) if source.members else {source.name: content}
    found = digest(files)
    if source.sha256 not in (None, found):
        where = f"{path}, delete it to fetch it anew" if kept else source.url
        raise InputError(
            f"--preset: expected a file of SHA-256 {source.sha256}, got {found}: {where}"
        )
    if not kept:
        make_folder(folder)
        write_atomically(path, lambda p: p.write_bytes(content))
    return files


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "twostep"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content: bytes = answer.read(_MOST_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"--preset: {url} cannot be fetched: {error}") from error
    if len(content) > _MOST_BYTES:
        raise InputError(f"--preset: {url} is larger than {_MOST_BYTES >> 20} MiB")
    return content


def _members(content: bytes, source: Source, path: Path) -> dict[str, bytes]:
    """What an archive holds, read in memory: nothing of it is unpacked."""
    assert source.members is not None
    found: dict[str, bytes] = {}
    room = _MOST_BYTES
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for item in archive.infolist():
                    if fnmatch(item.filename, source.members):
                        with archive.open(item) as file:
                            found[item.filename] = file.read(room + 1)
                        room -= len(found[item.filename])
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                for member in tar:
                    data = tar.extractfile(member) if member.isfile() else None
                    if data is not None and fnmatch(member.name, source.members):
                        found[member.name] = data.read(room + 1)
                        room -= len(found[member.name])
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise InputError(f"--preset: {path} is no archive that can be read: {error}") from error
    if room < 0:
        raise InputError(f"--preset: {path} holds more than {_MOST_BYTES >> 20} MiB")
    if not found:
        raise InputError(f"--preset: {path} holds no {source.members}")
    return found
