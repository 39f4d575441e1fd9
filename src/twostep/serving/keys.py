"""Bearer keys: where they come from, and comparing them in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from twostep.errors import InputError

# The variable itself, and any that begins so: TWOSTEP_API_KEY_ALICE.
VARIABLE = "TWOSTEP_API_KEY"
_MIN_LENGTH = 16


class Keys:
    """Keys that open the server; none opens it to everybody."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @staticmethod
    def read(file: Path | None, environment: Mapping[str, str]) -> Keys:
        """From a file, a key on each line (# begins a comment), and from the environment.

        Raises:
            InputError: for a file that cannot be read or holds none, or a key that is too short or
                has other characters than printable ASCII.
        """
        found = [
            (name, value.strip())
            for name, value in environment.items()
            if name == VARIABLE or name.startswith(f"{VARIABLE}_")
        ]
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise InputError(f"--api-keys: {file} cannot be read: {error}") from error
            keys = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
            if not keys:
                raise InputError(f"--api-keys: {file} holds no key")
            found += [(f"--api-keys: {file}", key) for key in keys]
        for source, key in found:
            if not re.fullmatch(rf"[!-~]{{{_MIN_LENGTH},}}", key):
                raise InputError(
                    f"{source}: expected keys of at least {_MIN_LENGTH} printable ASCII "
                    f"characters without spaces, got one of {len(key)}"
                )
        return Keys([key for _, key in found])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str | None) -> bool:
        """Whether a request with this header may come in; takes as long for every wrong key."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given, matches = _digest(key.strip()), False
        for digest in self._digests:
            matches |= hmac.compare_digest(digest, given)
        return matches and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
