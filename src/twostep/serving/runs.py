"""Runs of a training as the page shows them: curves and sample sheets, read from their folders."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from twostep.errors import InputError
from twostep.serving.errors import ApiError

_RECORDS, _SHEETS = "metrics.jsonl", "samples"
_MOST_POINTS = 240
# Of a run's records; older ones of a longer file are left out.
_MOST_BYTES = 32 * 2**20
DATA = "/runs/data"


@dataclass
class RunReader:
    """A run's folder, or a folder of them; read anew only where something changed.

    Attributes:
        folder: of one run, or whose folders are runs.
    """

    folder: Path
    _seen: dict[Path, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    @staticmethod
    def of(folder: Path | None) -> RunReader | None:
        """None for none.

        Raises:
            InputError: naming --runs, if it is no folder.
        """
        if folder is None:
            return None
        if not folder.is_dir():
            raise InputError(f"--runs: {folder} is no folder")
        return RunReader(folder.resolve())

    def runs(self) -> dict[str, Path]:
        """Their folders by name, the one written last first."""
        folders = [self.folder, *(path for path in self.folder.iterdir() if path.is_dir())]
        written: list[tuple[float, Path]] = []
        for path in folders:
            with suppress(OSError):
                written.append(((path / _RECORDS).stat().st_mtime, path))
        return {path.name: path for _, path in sorted(written, reverse=True)}

    def sheets(self, run: Path) -> dict[int, Path]:
        """Sample sheets by turn, ascending."""
        found = {}
        for path in sorted((run / _SHEETS).glob("turn-*.png")):
            with suppress(ValueError):
                found[int(path.stem.removeprefix("turn-"))] = path
        return found

    def about(self, run: Path) -> dict[str, Any]:
        """A run's curves: (turn, value) of every number in its records, neighbours averaged."""
        path = run / _RECORDS
        stat = path.stat()
        sheets = self.sheets(run)
        stamp = f"{stat.st_mtime_ns}-{stat.st_size}-{max(sheets, default=-1)}"
        if run not in self._seen or self._seen[run][0] != stamp:
            with path.open("rb") as file:
                file.seek(max(0, stat.st_size - _MOST_BYTES))
                series, turn = _series(file.read())
            facts = {"stamp": stamp, "turn": turn, "series": series, "sheets": list(sheets)}
            self._seen[run] = stamp, facts
        return self._seen[run][1]


def _series(data: bytes) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """The numbers by key, and the last turn; a torn line is left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    last = 0
    for line in data.split(b"\n"):
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = json.loads(line)
            turn = int(record.pop("turn"))
            last = max(last, turn)
            for key, value in record.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if is_number and math.isfinite(value):
                    found.setdefault(str(key), []).append((float(turn), float(value)))
    return {key: _thinned(points) for key, points in found.items()}, last


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = math.ceil(len(points) / _MOST_POINTS)
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def runs_api(reader: RunReader) -> APIRouter:
    """What the runs page asks for; needs a key where the server has keys."""
    router = APIRouter()

    def found(name: str) -> Path:
        runs = reader.runs()
        if name not in runs:
            raise ApiError(404, "not_found", "no such run")
        return runs[name]

    def list_runs() -> list[dict[str, Any]]:
        return [
            {"name": name, "written": (path / _RECORDS).stat().st_mtime}
            for name, path in reader.runs().items()
        ]

    @router.get(DATA)
    async def all_runs() -> dict[str, Any]:
        """Names, the one written last first."""
        return {"runs": await asyncio.to_thread(list_runs)}

    @router.get(f"{DATA}/{{name}}")
    async def one_run(name: str, seen: str = "") -> dict[str, Any]:
        """Its curves and the turns of its sheets; nothing new if they are as `seen` says."""
        about = await asyncio.to_thread(lambda: reader.about(found(name)))
        return {"stamp": seen} if about["stamp"] == seen else about

    @router.get(f"{DATA}/{{name}}/{{turn}}")
    async def sheet(name: str, turn: str) -> Response:
        """A sample sheet."""
        sheets = await asyncio.to_thread(lambda: reader.sheets(found(name)))
        path = {str(number): path for number, path in sheets.items()}.get(turn)
        if path is None:
            raise ApiError(404, "not_found", "no such sheet")
        return FileResponse(path, media_type="image/png")

    return router
