"""What each benchmark is: prompts, licence, seeds, layout of the pictures, published figures.

Addresses, layouts and numbers of seeds are those of the official repositories, read at the commits
named here; the figures are Z-Image's own report's (arXiv 2511.22699).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from twostep.errors import InputError
from twostep.evaluation.benchmarks.fetching import Source
from twostep.evaluation.benchmarks.layouts import Item, Layout, geneval, grid, numbered

_RAW = "https://raw.githubusercontent.com"
_GENEVAL = f"{_RAW}/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f"
_ELLA = (
    "https://codeload.github.com/TencentQQGYLab/ELLA/tar.gz/"
    "3c228f1dc6c4d3cad0a47493816151a419f14db3"
)
_ONEIG = f"{_RAW}/OneIG-Bench/OneIG-Benchmark/41b49831e79e6dde5323618c164da1c4cf0f699d"
_XOMNI = f"{_RAW}/X-Omni-Team/X-Omni/2b8237bb3789638c290eeda3e83ed81bd3652c3b/textbench"
_TURBO, _BASE = "Z-Image-Turbo, 8 steps", "Z-Image, 100 evaluations"
# Folder of each of OneIG's categories.
_ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One benchmark.

    Attributes:
        licence: of the prompts, as their owners state it.
        home: where its scorer is.
        read: the source's files to its items, in the benchmark's order.
        layout: writes the pictures as the scorer reads them.
        seeds: pictures of each prompt.
        shape: of the folder, in a line.
        figure: finds the score in what the scorer prints; None where it writes files.
        published: figures of Z-Image's report, by model.
    """

    name: str
    title: str
    licence: str
    home: str
    source: Source
    read: Callable[[Mapping[str, bytes]], list[Item]]
    layout: Layout
    seeds: int
    shape: str
    figure: str | None = None
    published: Mapping[str, str] = field(default_factory=dict)


def _lines(files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    (text,) = files.values()
    for line in text.decode("utf-8-sig").splitlines():
        if line.strip():
            yield json.loads(line)


def _geneval(files: Mapping[str, bytes]) -> list[Item]:
    return [
        Item(facts["prompt"], f"{number:05d}", facts) for number, facts in enumerate(_lines(files))
    ]


def _dpg(files: Mapping[str, bytes]) -> list[Item]:
    return [
        Item(files[name].decode("utf-8-sig").strip(), PurePosixPath(name).stem)
        for name in sorted(files)
    ]


def _longtext(files: Mapping[str, bytes]) -> list[Item]:
    return [Item(facts["prompt"], f"{facts['prompt_id']:04d}") for facts in _lines(files)]


def _oneig(files: Mapping[str, bytes]) -> list[Item]:
    (text,) = files.values()
    rows = csv.DictReader(text.decode("utf-8-sig").splitlines(keepends=True))
    return [
        Item(
            row.get("prompt_en") or row["prompt_cn"],
            f"{_ONEIG_FOLDERS[row['category']]}/{{model}}/{row['id']}",
        )
        for row in rows
    ]


def _cvtg(files: Mapping[str, bytes]) -> list[Item]:
    items = []
    for name in sorted(files):
        path = PurePosixPath(name)
        for data in json.loads(files[name].decode("utf-8-sig"))["data_list"]:
            items.append(Item(data["prompt"], f"{path.parent.name}/{path.stem}/{data['index']}"))
    return items


def read_items(preset: Preset, files: Mapping[str, bytes]) -> list[Item]:
    """The benchmark's prompts.

    Raises:
        InputError: for files in another form.
    """
    try:
        items = preset.read(files)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--preset: {preset.source.name} is not in {preset.title}'s form: {error!r}"
        ) from error
    if not items:
        raise InputError(f"--preset: {preset.source.name} holds no prompts")
    return items


def _longtext_preset(name: str, source: Source, *, published: Mapping[str, str]) -> Preset:
    return Preset(
        name=name,
        title="LongText-Bench",
        licence="Apache-2.0",
        home="https://github.com/X-Omni-Team/X-Omni",
        source=source,
        read=_longtext,
        layout=numbered,
        seeds=4,
        shape="NNNN_1.png to NNNN_4.png",
        figure=r"Text Score:\s*([\d.]+)",
        published=published,
    )


def _oneig_preset(name: str, title: str, source: Source, *, published: Mapping[str, str]) -> Preset:
    return Preset(
        name=name,
        title=title,
        licence="CC-BY-NC-4.0 (not for commercial use)",
        home="https://github.com/OneIG-Bench/OneIG-Benchmark",
        source=source,
        read=_oneig,
        layout=grid("webp"),
        seeds=4,
        shape="CATEGORY/MODEL/NNN.webp, four pictures in a square",
        published=published,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="geneval",
            title="GenEval",
            licence="MIT",
            home="https://github.com/djghosh13/geneval",
            source=Source(
                f"{_GENEVAL}/prompts/evaluation_metadata.jsonl",
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
            read=_geneval,
            layout=geneval,
            seeds=4,
            shape="NNNNN/metadata.jsonl, NNNNN/samples/0000.png to 0003.png",
            figure=r"Overall score[^:]*:\s*([\d.]+)",
            published={_TURBO: "0.82", _BASE: "0.84"},
        ),
        Preset(
            name="dpg",
            title="DPG-Bench",
            licence="Apache-2.0",
            home="https://github.com/TencentQQGYLab/ELLA",
            source=Source(
                _ELLA,
                "090f744aaa64391b0b6c7e80b9ff4148bbd78da00e884770005df2245cd0b159",
                members="*/dpg_bench/prompts/*.txt",
            ),
            read=_dpg,
            layout=grid("png"),
            seeds=4,
            shape="NAME.png, four pictures in a square",
            figure=r"DPG-Bench score:\s*([\d.]+)",
            published={_TURBO: "84.86", _BASE: "88.14"},
        ),
        _oneig_preset(
            "oneig",
            "OneIG-Bench",
            Source(
                f"{_ONEIG}/OneIG-Bench.csv",
                "e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1",
            ),
            published={
                _TURBO: "0.528 overall; alignment 0.840, text 0.994, reasoning 0.298, style 0.368, "
                "diversity 0.139",
                _BASE: "0.546 overall; alignment 0.881, text 0.987, reasoning 0.280, style 0.387, "
                "diversity 0.194",
            },
        ),
        _oneig_preset(
            "oneig-zh",
            "OneIG-Bench-ZH",
            Source(
                f"{_ONEIG}/OneIG-Bench-ZH.csv",
                "8fc4ae1403db32dbb1203cc457361c3215500b34e741194a53f5002c9d824700",
            ),
            published={
                _TURBO: "0.507 overall; diversity 0.134",
                _BASE: "0.535 overall; diversity 0.243",
            },
        ),
        _longtext_preset(
            "longtext",
            Source(
                f"{_XOMNI}/text_prompts.jsonl",
                "a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8",
            ),
            published={_TURBO: "0.917", _BASE: "0.935"},
        ),
        _longtext_preset(
            "longtext-zh",
            Source(
                f"{_XOMNI}/text_prompts_zh.jsonl",
                "6512cd121ac093e8113e114d76eb2c0ce967c220b18e2049e1063554ce496758",
            ),
            published={_TURBO: "0.926", _BASE: "0.936"},
        ),
        Preset(
            name="cvtg",
            title="CVTG-2K",
            licence="not stated in its repository; see its page on the hub",
            home="https://github.com/NJU-PCALab/TextCrafter",
            source=Source("hf:dnkdnk/CVTG-2K/CVTG-2K.zip", None, members="*/CVTG*/[2-5].json"),
            read=_cvtg,
            layout=numbered,
            seeds=1,
            shape="SET/AREAS/INDEX.png",
            published={_TURBO: "0.8585 word accuracy", _BASE: "0.8671 word accuracy"},
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: for another one.
    """
    if name not in PRESETS:
        raise InputError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
