"""What the sections of a recipe are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# A folder; a URL stays as it was typed.
Place = Annotated[Path | str, AfterValidator(lambda v: v if "://" in str(v) else Path(v))]
# (height, width) in pixels
Size = tuple[Count, Count]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
