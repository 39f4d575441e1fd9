"""What the runs page is given of a training's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from serving_fakes import offer, served
from twostep.errors import InputError
from twostep.serving.engine import Engine
from twostep.serving.keys import Keys
from twostep.serving.runs import RunReader

KEY = "a-key-of-this-test"


def write_run(folder: Path, turns: int, sheets: tuple[int, ...] = ()) -> Path:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    records = [
        {"turn": turn, "loss": 1.0 / turn, "name": "x", "flag": True}
        for turn in range(1, turns + 1)
    ]
    lines = [*map(json.dumps, records), '{"turn": 3, "loss": NaN}', "torn {", "[]", '{"loss": 1}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for turn in sheets:
        Image.new("RGB", (8, 8), (turn, 0, 0)).save(folder / "samples" / f"turn-{turn:07d}.png")
    return folder


def test_curves_are_averages_of_neighbours_and_follow_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 3)
    reader = RunReader(tmp_path)
    first = reader.about(run)
    assert first["series"] == {"loss": [(1.0, 1.0), (2.0, 0.5), (3.0, 1 / 3)]}
    assert (first["turn"], first["sheets"]) == (3, [])
    assert reader.about(run) is first
    write_run(run, 480, (2, 1))
    later = reader.about(run)
    assert later["stamp"] != first["stamp"]
    assert (later["turn"], later["sheets"]) == (480, [1, 2])
    points = later["series"]["loss"]
    assert len(points) == 240
    assert points[0] == (1.5, 0.75)


def test_a_folder_of_runs_or_one_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1)
    (tmp_path / "other").mkdir()
    assert list(RunReader(tmp_path).runs()) == ["a"]
    assert list(RunReader(tmp_path / "a").runs()) == ["a"]
    with pytest.raises(InputError, match=r"--runs: .*none is no folder"):
        RunReader.of(tmp_path / "none")


def test_over_http_with_a_key_and_no_other_files(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", 3, (1,))
    (tmp_path / "secret").write_text("secret")

    def ask(path: str, key: str | None = KEY) -> tuple[int, bytes]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            with urlopen(Request(f"{url}{path}", headers=headers), timeout=10) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def value(path: str) -> Any:
        return json.loads(ask(path)[1])

    options: dict[str, Any] = {"keys": Keys([KEY]), "runs": tmp_path / "runs"}
    with served(Engine(dict), {"a": offer("a")}, **options) as url:
        assert ask("/runs", None)[0] == 200
        assert ask("/runs/data", None)[0] == ask("/runs/data/a/1", None)[0] == 401
        assert [run["name"] for run in value("/runs/data")["runs"]] == ["a"]
        about = value("/runs/data/a")
        assert (about["turn"], about["sheets"]) == (3, [1])
        assert value(f"/runs/data/a?seen={about['stamp']}") == {"stamp": about["stamp"]}
        assert ask("/runs/data/a/1")[1].startswith(b"\x89PNG")
        for path in ("b", "a/2", "a/x", "..", "%2e%2e", "..%2fsecret", "a/..%2f..%2fsecret"):
            status, text = ask(f"/runs/data/{path}")
            assert (status, json.loads(text)["error"]["code"]) == (404, "not_found")
            assert b"secret" not in text


def test_without_a_folder_there_is_no_page() -> None:
    with served(Engine(dict), {"a": offer("a")}) as url, pytest.raises(HTTPError, match="404"):
        urlopen(f"{url}/runs", timeout=10)
