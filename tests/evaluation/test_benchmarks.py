"""The field's benchmarks on tiny prompt files, fetched from a local server; no scorer of theirs."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app
from twostep.errors import InputError
from twostep.evaluation.benchmarks import presets
from twostep.evaluation.benchmarks.fetching import Source, digest, fetch
from twostep.evaluation.benchmarks.layouts import Item, grid, numbered
from twostep.evaluation.benchmarks.official_scorer import OfficialScorer
from twostep.evaluation.benchmarks.presets import PRESETS, find_preset, read_items
from twostep.evaluation.picture_index import PictureIndex

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a bus"},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and where a server shows it."""
    folder = tmp_path_factory.mktemp("served")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_files_are_fetched_once_and_checked(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "p.jsonl").write_bytes(b"one\n")
    right = sha256(b"one\n").hexdigest()
    source = Source(f"{url}/p.jsonl", right)
    assert fetch(source, tmp_path) == {"p.jsonl": b"one\n"}
    (folder / "p.jsonl").write_bytes(b"two\n")
    assert fetch(source, tmp_path) == {"p.jsonl": b"one\n"}  # kept
    with pytest.raises(InputError, match=f"expected a file of SHA-256 {right}, got .*/p.jsonl"):
        fetch(source, tmp_path / "anew")
    assert not (tmp_path / "anew").exists()
    (tmp_path / "p.jsonl").write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete it to fetch it anew"):
        fetch(source, tmp_path)
    with pytest.raises(InputError, match="cannot be fetched: HTTP Error 404"):
        fetch(Source(f"{url}/none", right), tmp_path)


def test_archives_are_read_and_never_unpacked(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    prompts = {"b.txt": b"a bus", "a.txt": b"a dog"}
    inside = {f"ELLA-1/dpg_bench/prompts/{n}": c for n, c in prompts.items()}
    (folder / "tar").write_bytes(tar_of({**inside, "ELLA-1/../../evil": b"x", "README.txt": b"y"}))
    expected = sha256(b"a.txt\0a dog\0b.txt\0a bus\0").hexdigest()
    source = Source(f"{url}/tar", expected, "*/dpg_bench/prompts/*.txt")
    files = fetch(source, tmp_path)
    assert digest(files) == expected
    items = read_items(find_preset("dpg"), files)
    assert [(i.prompt, i.place) for i in items] == [("a dog", "a"), ("a bus", "b")]
    assert [p.name for p in tmp_path.iterdir()] == ["tar"]
    # A file of the hub, by the hub's address or a mirror's.
    cvtg = PRESETS["cvtg"]
    monkeypatch.setenv("HF_ENDPOINT", url)
    place = folder / "datasets/dnkdnk/CVTG-2K/resolve/main"
    place.mkdir(parents=True)
    data = {"data_list": [{"index": 7, "prompt": "a sign that says 'A' and 'B'"}]}
    names = ("CVTG/2.json", "CVTG/2_combined.json", "CVTG-Style/5.json")
    content = {f"CVTG-2K/{name}": json.dumps(data).encode() for name in names}
    (place / "CVTG-2K.zip").write_bytes(zip_of(content))
    items = read_items(cvtg, fetch(cvtg.source, tmp_path / "cvtg"))
    assert [i.place for i in items] == ["CVTG-Style/5/7", "CVTG/2/7"]
    monkeypatch.delenv("HF_ENDPOINT")
    assert cvtg.source.url.startswith("https://huggingface.co/datasets/dnkdnk/CVTG-2K/")
    (folder / "none").write_bytes(zip_of({"other": b""}))
    with pytest.raises(InputError, match="holds no"):
        fetch(Source(f"{url}/none", None, "*/x"), tmp_path)
    with pytest.raises(InputError, match="is no archive"):
        fetch(Source(f"{url}/p.jsonl", None, "*/x"), tmp_path / "more")


def test_prompts_in_each_form() -> None:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["category", "id", "prompt_en", "type", "prompt_length", "class"])
    rows.writerow(["Portrait", "003", "a woman,\nsmiling", "T", "short", ""])
    (item,) = read_items(find_preset("oneig"), {"x": text.getvalue().encode()})
    assert (item.prompt, item.place) == ("a woman,\nsmiling", "human/{model}/003")
    zh = "category,id,prompt_cn,class\nMultilingualism,001,一只猫,\n".encode()
    assert read_items(find_preset("oneig-zh"), {"x": zh})[0].place == "multilingualism/{model}/001"
    line = json.dumps({"prompt": "a sign", "prompt_id": 12, "text": ["A"]}).encode()
    assert read_items(find_preset("longtext"), {"x": line})[0].place == "0012"
    with pytest.raises(InputError, match="not in GenEval's form: KeyError"):
        read_items(find_preset("geneval"), {"x": b"{}"})
    with pytest.raises(InputError, match="expected one of geneval, dpg, oneig, "):
        find_preset("fid")
    # Whatever forbids commercial use is fetched, and checked where it stays the same.
    for preset in PRESETS.values():
        assert preset.source.url.startswith("https://")
        assert (preset.source.sha256 is None) == (preset.name == "cvtg")
        assert preset.published


def test_pictures_lie_as_the_scorers_read_them(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    pictures = [Image.new("RGB", (16, 8), colour) for colour in colours]
    item = Item("x", "x")
    grid("png")(pictures, tmp_path / "a.b", item)
    page = np.asarray(Image.open(tmp_path / "a.b.png"))
    assert page.shape == (16, 32, 3)
    corners = [page[0, 0], page[0, 31], page[15, 0], page[15, 31]]
    assert [tuple(c) for c in corners] == colours  # row by row
    grid("webp")(pictures, tmp_path / "c", item)
    assert Image.open(tmp_path / "c.webp").size == (32, 16)
    numbered(pictures, tmp_path / "0007", item)
    numbered(pictures[:1], tmp_path / "7", item)
    assert {p.name for p in tmp_path.glob("*7*")} == {
        "0007_1.png", "0007_2.png", "0007_3.png", "0007_4.png", "7.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python score.py", "expected a command with {images}"),
        ("python {images} {folder}", "no others than"),
        ("nosuchcommand {images}", "no program 'nosuchcommand'"),
        ("python '{images}", "No closing quotation"),
    ],
)
def test_a_scorer_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OfficialScorer.parse(text)


def test_a_benchmark_by_the_command(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    content = "".join(json.dumps(each) + "\n" for each in GENEVAL).encode()
    (folder / "metadata.jsonl").write_bytes(content)
    source = Source(f"{url}/metadata.jsonl", sha256(content).hexdigest())
    preset = replace(PRESETS["geneval"], source=source, seeds=2)
    monkeypatch.setitem(presets.PRESETS, "geneval", preset)
    scorer = tmp_path / "score.py"
    scorer.write_text(
        "import sys, pathlib\n"
        "images, out = map(pathlib.Path, sys.argv[1:3])\n"
        "count = len(list(images.glob('*/samples/*.png')))\n"
        "(out / 'results.jsonl').write_text('x')\n"
        "print(f'Overall score (avg. over tasks): {count / 5:.5f}')\n"
        "sys.exit(3 if 'teacher' in sys.argv[3] else 0)\n"
    )
    out = tmp_path / "out"
    arguments = [
        "evaluate", "--model", "zoo:emoji-student", "--reference", "zoo:emoji-teacher",
        "--reference-steps", "2", "--out", str(out), "--preset", "geneval",
        "--official", f"{sys.executable} {scorer} {{images}} {{results}} {{model}}",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    place = out / "geneval"
    for key in ("student_2", "teacher_2"):
        pictures = place / "pictures" / key
        names = sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.*"))
        assert names == [
            f"0000{n}/{name}" for n in range(2)
            for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
        ]  # fmt: skip
        assert json.loads((pictures / "00001/metadata.jsonl").read_text()) == GENEVAL[1]
    index = PictureIndex.read(out)
    second = Image.open(place / "pictures/student_2/00001/samples/0001.png")
    expected = index.picture("student_2", 3).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(second), expected)
    result = json.loads((place / "benchmark.json").read_text())
    assert result["models"]["student_2"]["score"] == 0.8  # 4 pictures
    assert result["models"]["teacher_2"]["code"] == 3
    assert result["licence"] == "MIT"
    said = " ".join(done.output.split())
    assert "student_2: 0.8" in said
    assert "teacher_2: the scorer ended with 3, see teacher_2.log" in said
    assert "published, Z-Image-Turbo, 8 steps: 0.82" in said
    assert (place / "results/student_2/results.jsonl").exists()
    refused = CliRunner().invoke(app, [*arguments[:-4], "--first", "1"])
    assert isinstance(refused.exception, InputError)
    assert "--first: is for a --preset" in str(refused.exception)
