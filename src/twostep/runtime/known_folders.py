"""Where folders lie on this machine that files name by their checksum alone.

Kept in the user's cache directory, so that no file that is passed on holds a path.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from twostep.runtime.checksums import user_cache
from twostep.runtime.files import write_json

_MOST = 500


def _file() -> Path:
    return user_cache() / "folders.json"


def _known() -> dict[str, str]:
    with suppress(OSError, ValueError, RuntimeError, AttributeError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()}
    return {}


def remember(fingerprint: str, folder: Path) -> None:
    """Notes where a folder of this fingerprint lies; where nothing can be written, it does not."""
    place, known = str(folder.resolve()), _known()
    if known.get(fingerprint) == place:
        return
    known.pop(fingerprint, None)
    newest = dict([*known.items(), (fingerprint, place)][-_MOST:])
    with suppress(OSError, RuntimeError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), newest)


def recall(fingerprint: str) -> Path | None:
    """Where it lay when it was last seen; None if nobody knows."""
    place = _known().get(fingerprint)
    return None if place is None else Path(place)
