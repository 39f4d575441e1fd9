"""Draws the study's curves: the validated distance of the preview against turns.

python studies/ablation/plots.py runs/ablation/results.json runs/ablation/curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

PANELS = {"ladder": "From nothing to the method", "removal": "The method less one idea"}


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per table of `PANELS`; bands are the range over seeds."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 5), constrained_layout=True)
    for axis, (table, title) in zip(axes, PANELS.items(), strict=True):
        for name, label in results["tables"][table].items():
            runs = results["rows"].get(name)
            if runs is None:
                continue
            share = np.array([point["turn"] for point in runs[0]["curve"]], float)
            values = np.array([[point["step1_distance"] for point in run["curve"]] for run in runs])
            (line,) = axis.plot(share / share[-1], values.mean(0), label=label)
            axis.fill_between(
                share / share[-1], values.min(0), values.max(0), color=line.get_color(), alpha=0.15
            )
        axis.set(title=title, xlabel="share of the budget", ylabel="distance of the preview")
        axis.set_yscale("log")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
