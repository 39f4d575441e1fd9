"""Stage `fetch`: the emoji pictures and labels, from the npm registry, checksummed."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

from twostep.emoji.scenes import OBJECTS

# The registry's own integrity values (npm view NAME@VERSION dist.integrity).
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
    ),
    "emojibase-data@17.0.0": (
        "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="
    ),
}


def fetch_art(work: Path) -> Path:
    """Downloads and unpacks both packages; returns the folder of pictures.

    Raises:
        RuntimeError: if npm is missing, or a package is not the one that was pinned.
    """
    folder = work / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    for package, integrity in PACKAGES.items():
        target = folder / package.replace("@", "").replace("/", "-")
        if (target / "package").is_dir():
            continue
        archive = _pack(package, folder)
        algorithm, expected = integrity.split("-", 1)
        digest = hashlib.new(algorithm, archive.read_bytes()).digest()
        if base64.b64encode(digest).decode() != expected:
            raise RuntimeError(f"{archive} is not the pinned {package}: its checksum differs")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    _check_labels(folder / "emojibase-data17.0.0" / "package")
    return folder / "lobehub-fluent-emoji-3d1.1.0" / "package" / "assets"


def _pack(package: str, folder: Path) -> Path:
    command = ["npm", "pack", package, "--json", "--pack-destination", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError("npm is needed to fetch the emoji packages; install Node.js") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error.stderr[-500:]}") from error
    answer = json.loads(result.stdout)
    entry = answer[0] if isinstance(answer, list) else next(iter(answer.values()))
    name: str = entry["filename"]
    return folder / name.replace("@", "").replace("/", "-")


def _check_labels(package: Path) -> None:
    """Our names are emojibase's labels, or shorter forms that share a character with them."""
    for language in ("en", "zh"):
        entries = json.loads((package / language / "data.json").read_text(encoding="utf-8"))
        labels = {entry["hexcode"]: entry["label"] for entry in entries}
        for emoji in OBJECTS:
            code = emoji.code.upper()
            if labels.get(code) is None and labels.get(code.split("-")[0]) is None:
                raise RuntimeError(f"emojibase-data has no label for {emoji.name!r} ({code})")
