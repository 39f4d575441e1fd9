"""What a library says of the weights that it read, taken seriously."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.errors import ModelError

if TYPE_CHECKING:
    import torch


def load_diffusers(
    kind: Any, folder: Path, part: str | None, dtype: torch.dtype, *, exact: bool = False
) -> Any:
    """A diffusers model of class `kind`, if its files hold all of it.

    Args:
        part: a subfolder; None for a folder of its own.
        exact: as in `complete`.

    Raises:
        ModelError: as `complete`.
    """
    found = kind.from_pretrained(
        folder,
        subfolder=part,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return complete(found, folder / (part or ""), exact=exact)


def complete(found: tuple[Any, dict[str, Any]], path: Path, *, exact: bool = False) -> Any:
    """A model of `from_pretrained(..., output_loading_info=True)`, if its files hold all of it.

    What a file lacks, libraries leave at random values, with a warning at most.

    Args:
        exact: nothing may be left over either.

    Raises:
        ModelError: naming the first tensor.
    """
    model, info = found
    faults = [("lack", "missing_keys"), ("hold another shape of", "mismatched_keys")]
    faults += [("hold a surplus", "unexpected_keys")] if exact else []
    for what, kind in faults:
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{path}: the weights {what} {names[0][:100]}{more}")
    return model
