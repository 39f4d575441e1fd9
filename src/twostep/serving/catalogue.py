"""The models that a server offers, as the application needs to know them: no weights here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Offer:
    """A model by the name that clients use.

    Attributes:
        name: what clients call it.
        kind: teacher, student or lora_pair.
        steps: that it takes.
        size: (height, width) of a picture unless the client names one.
        weights: tells other weights of the same name apart.
        embedded: whether it is one of the package's own toys.
        created: seconds since 1970, of its newest file.
        check_size: raises InputError for a (height, width) that it does not take.
    """

    name: str
    kind: str
    steps: int
    size: tuple[int, int]
    weights: str
    embedded: bool
    created: int
    check_size: Callable[[tuple[int, int]], Any]

    def as_json(self) -> dict[str, Any]:
        """As `GET /v1/models` lists it; `twostep` is an extension of OpenAI's object."""
        height, width = self.size
        about = {
            "kind": self.kind,
            "steps": self.steps,
            "size": f"{width}x{height}",
            "weights": self.weights,
            "embedded": self.embedded,
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "twostep",
            "twostep": about,
        }


Catalogue = Mapping[str, Offer]
