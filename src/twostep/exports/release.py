"""What a release must not hold: a path of the machine that made it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from twostep.errors import ExportError

_TEXTS = (".json", ".md", ".txt", ".yaml", ".jinja", ".py", ".html")
_MOST_HEADER, _MOST_ENTRY = 64 << 20, 256 << 20


def check_public(folder: Path, places: Iterable[Path]) -> None:
    """Looks at texts, headers of weights and the programs of archives, not at weights.

    Args:
        places: of this machine, which nobody else may read of.

    Raises:
        ExportError: naming the file.
    """
    # Shorter ones, such as /root or /tmp, are words that a tokenizer may hold.
    wanted = {str(p): str(p).encode() for p in places if p.is_absolute() and len(p.parts) > 2}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for content in _contents(path):
            for place, text in wanted.items():
                if text in content:
                    raise ExportError(
                        f"{path.relative_to(folder)} would tell of the folder {place} on this "
                        "machine; nothing is written"
                    )


def _contents(path: Path) -> Iterator[bytes]:
    if path.suffix in _TEXTS:
        yield path.read_bytes()
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            yield file.read(min(length, _MOST_HEADER))
    elif path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                yield entry.filename.encode()
                if entry.filename.endswith(".json") and entry.file_size < _MOST_ENTRY:
                    yield archive.read(entry)
