"""The page that shows a comparison: verdict, pictures, figures, curves of the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from twostep.evaluation.report.curves import PLOT, draw_charts
from twostep.evaluation.report.pictures import (
    PictureGroup,
    language_of,
    picture_pairs,
    picture_rows,
)
from twostep.evaluation.report.table import table_columns, table_rows
from twostep.evaluation.report.votes import votes_section
from twostep.evaluation.report.words import notes, origin, verdict
from twostep.runtime.files import write_text

_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    folder: Path,
    report: dict[str, Any],
    *,
    panels: Mapping[str, Tensor],
    captions: Sequence[str],
    title: str,
    curves: Sequence[dict[str, Any]] = (),
    groups: Sequence[PictureGroup] = (),
    seeds: Sequence[int] | None = None,
    votes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/report.html`, its path: one file that needs no network and no script.

    Args:
        folder: made when missing.
        report: figures in the shape of `Comparison.figures`, with where they come from (`command`,
            `commit`, `machine`, `date`, `minutes`, `turns`, `recipe`); what is absent is not shown.
        panels: a row of pictures per model, (K, 3, H, W) in -1..1; column k shows prompt k at
            equal noise.
        captions: K prompts.
        curves: records of the training, each with `turn`; other keys may be absent.
        groups: pictures behind the figures, which link there.
        seeds: K, of the noise of each column.
        votes: as in `votes.json`.

    Raises:
        ValueError: a panel does not hold one picture per caption.
    """
    for label, images in panels.items():
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(captions):
            raise ValueError(
                f"panel {label!r} must have shape ({len(captions)}, 3, H, W), a picture per "
                f"caption; got {tuple(images.shape)}"
            )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    columns = table_columns(report)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        verdict=verdict(report),
        panels=picture_rows(panels, captions, seeds),
        captions=[(caption, language_of(caption)) for caption in captions],
        groups=[(group, picture_pairs(group)) for group in groups],
        links={figure: group.anchor for group in groups for figure in group.figures},
        columns=columns,
        rows=table_rows(report, columns),
        votes=votes_section(votes),
        charts=draw_charts(curves),
        plot=PLOT,
        measured=notes(report),
        origin=origin(report),
        recipe=json.dumps(report.get("recipe"), indent=2, ensure_ascii=False)
        if report.get("recipe")
        else "",
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_text(path, page)
    return path
