"""Draws the study's curves: validation distance against turns, and against evaluations.

python studies/ablation/plots.py runs/ablation/results.json runs/ablation/curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

PANELS = {"ladder": "From nothing to the method", "peer": "Other methods, equal evaluations"}


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per table of `PANELS`; bands are the range over seeds."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4), constrained_layout=True)
    for axis, (table, title) in zip(axes, PANELS.items(), strict=True):
        for name, label in results["tables"][table].items():
            runs = results["rows"].get(name)
            if runs is None:
                continue
            share = np.array([point["turn"] for point in runs[0]["curve"]], float)
            values = np.array([[point["distance"] for point in run["curve"]] for run in runs])
            (line,) = axis.plot(share / share[-1], values.mean(0), label=label)
            axis.fill_between(
                share / share[-1], values.min(0), values.max(0), color=line.get_color(), alpha=0.15
            )
        axis.set(title=title, xlabel="share of the budget", ylabel="validation distance")
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
