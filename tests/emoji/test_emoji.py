"""The embedded world: captions, hold-out, renderer, inspector; and the shipped folders."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image

from twostep.emoji.inspector import (
    GRID,
    Found,
    Inspector,
    Reading,
    Verdict,
    _decode,
    is_right,
    score,
)
from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import (
    BACKGROUND_NAMES,
    OBJECTS,
    Scene,
    held_out_scenes,
    is_held_out,
    sample_training_scene,
)
from twostep.zoo import ZOO, model_names, zoo_folder

NAMES = [o.name for o in OBJECTS]
APPLE, BUS, FISH = NAMES.index("apple"), NAMES.index("bus"), NAMES.index("fish")
RED, BLUE = BACKGROUND_NAMES.index("red"), BACKGROUND_NAMES.index("blue")


@pytest.mark.parametrize(
    ("scene", "english", "chinese"),
    [
        (Scene((APPLE,), RED), "an apple on a red background", "一个苹果，红色背景"),
        (Scene((BUS, BUS), BLUE), "two buses on a blue background", "两辆公交车，蓝色背景"),
        (Scene((FISH,) * 3, BLUE), "three fish on a blue background", "三条鱼，蓝色背景"),
        (
            Scene((FISH, APPLE), RED),
            "a fish and an apple on a red background",
            "一条鱼和一个苹果，红色背景",
        ),
        (
            Scene((BUS, FISH), RED, "left of"),
            "a bus to the left of a fish on a red background",
            "一辆公交车在一条鱼的左边，红色背景",
        ),
        (
            Scene((BUS, FISH), RED, "above"),
            "a bus above a fish on a red background",
            "一辆公交车在一条鱼的上面，红色背景",
        ),
    ],
)
def test_captions(scene: Scene, english: str, chinese: str) -> None:
    assert scene.caption("en") == english
    assert scene.caption("zh") == chinese
    assert scene.caption("en", name_background=False) == english.split(" on ")[0]


def test_no_training_scene_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_training_scene(rng)) for _ in range(3000))
    held_out = held_out_scenes(512)
    assert all(is_held_out(s) for s in held_out)
    assert {
        c: sum(s.category == c for s in held_out) for c in ("single", "two", "counting", "position")
    } == {
        "single": 128,
        "two": 128,
        "counting": 128,
        "position": 128,
    }


def test_a_held_out_pair_is_held_out_in_either_order_and_any_relation() -> None:
    pair = next(s for s in held_out_scenes(64) if s.category == "position")
    a, b = pair.objects
    for background in range(len(BACKGROUND_NAMES)):
        for relation in (None, "left of", "below"):
            assert is_held_out(Scene((b, a), background, relation))


@pytest.fixture
def sprites(tmp_path: Path) -> tuple:
    for i, emoji in enumerate(OBJECTS):
        Image.new("RGBA", (128, 128), (12 * i, 255 - 12 * i, 80, 255)).save(
            tmp_path / f"{emoji.code}.webp"
        )
    load_sprites.cache_clear()
    return load_sprites(tmp_path)


def test_renderer_places_objects_as_asked(sprites: tuple) -> None:
    rng = np.random.default_rng(0)
    for relation, axis, sign in (
        ("left of", 0, -1),
        ("right of", 0, 1),
        ("above", 1, -1),
        ("below", 1, 1),
    ):
        for _ in range(20):
            drawn = render(Scene((APPLE, BUS), RED, relation), sprites, rng)
            gap = drawn.centres[0] - drawn.centres[1]
            assert sign * gap[axis] > 0.3
            assert drawn.image.shape == (64, 64, 3)
            assert set(np.unique(drawn.occupancy)) == {0, APPLE + 1, BUS + 1}


def test_unrelated_objects_lie_in_reading_order(sprites: tuple) -> None:
    rng = np.random.default_rng(0)
    gaps = [
        centres[1] - centres[0]
        for centres in (render(Scene((APPLE, BUS), RED), sprites, rng).centres for _ in range(60))
    ]
    assert all(dx + dy > 0.15 for dx, dy in gaps)
    assert any(dy < 0 for _, dy in gaps)
    assert any(dx < 0 for dx, _ in gaps)


def test_equal_objects_are_grouped_about_the_middle(sprites: tuple) -> None:
    rng = np.random.default_rng(0)
    turns = set()
    for count in (2, 3):
        for _ in range(40):
            offsets = render(Scene((APPLE,) * count, RED), sprites, rng).centres - 0.5
            angles = np.sort(np.arctan2(offsets[:, 1], offsets[:, 0]))
            gaps = np.diff([*angles, angles[0] + 2 * np.pi])
            assert gaps.max() < 2 * np.pi / count + 1.0
            turns.add(int(angles[0] // 0.5))
    assert len(turns) > 3  # at any turn


def test_renderer_is_a_function_of_its_generator(sprites: tuple) -> None:
    scene = Scene((APPLE,) * 3, BLUE)
    one, two, other = (render(scene, sprites, np.random.default_rng(s)).image for s in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture of 'apple'"):
        load_sprites(tmp_path)


def test_detections_are_the_heatmaps_peaks() -> None:
    logits = torch.full((1, len(OBJECTS), GRID, GRID), -8.0)
    logits[0, APPLE, 3, 4] = 4.0
    logits[0, APPLE, 3, 5] = 2.0  # the same apple
    logits[0, BUS, 12, 10] = 3.0
    logits[0, FISH, 8, 8] = -1.0  # below the threshold
    background = torch.zeros(1, len(BACKGROUND_NAMES))
    background[0, BLUE] = 1
    (found,) = _decode(Reading(logits, background, torch.zeros(1, 1)))
    assert found == Found(((APPLE, 4.5 / GRID, 3.5 / GRID), (BUS, 10.5 / GRID, 12.5 / GRID)), BLUE)


def test_verdicts() -> None:
    apple, bus = (APPLE, 0.2, 0.5), (BUS, 0.7, 0.5)
    left = Scene((APPLE, BUS), RED, "left of")
    assert is_right(left, Found((apple, bus), RED)) == Verdict(True, True, True, True)
    assert is_right(left, Found((apple, bus), BLUE)) == Verdict(True, True, True, False)
    mirrored = Found(((APPLE, 0.7, 0.5), (BUS, 0.2, 0.5)), RED)
    assert is_right(left, mirrored) == Verdict(True, True, False, True)
    assert not is_right(left, Found((apple,), RED)).objects
    assert is_right(Scene((APPLE, APPLE), RED), Found((apple,), RED)) == Verdict(
        True, False, True, True
    )
    assert not is_right(Scene((APPLE,), RED), Found((apple, bus), RED)).objects


def test_score_by_category() -> None:
    scenes = [
        Scene((APPLE,), RED),
        Scene((APPLE,) * 2, RED),
        Scene((APPLE, BUS), RED),
        Scene((APPLE,), RED),
    ]
    verdicts = [
        Verdict(True, True, True, True),
        Verdict(True, False, True, True),
        Verdict(True, True, True, False),
        Verdict(False, False, True, True),
    ]
    result = score(scenes, verdicts)
    assert result["overall"] == 0.25
    assert (result["single"], result["counting"], result["two"]) == (0.5, 0.0, 1.0)
    assert result["background"] == 0.75
    assert np.isnan(result["position"])


def test_shipped_inspector_reports_its_own_accuracy() -> None:
    folder = ZOO / "inspector"
    accuracy = json.loads((folder / "accuracy.json").read_text())
    assert accuracy["single"] >= 0.97
    model = Inspector.load(folder)
    blank = model.detect(torch.zeros(1, 3, 64, 64))[0]
    assert blank.objects == ()


def test_inspector_reads_the_teachers_pictures() -> None:
    """The shipped teacher, through stock diffusers, seen by the shipped inspector."""
    pipe = ZImagePipeline.from_pretrained(zoo_folder("emoji-teacher"))
    pipe.set_progress_bar_config(disable=True)
    scenes = [s for s in held_out_scenes(64) if s.category == "single"][:16]
    images = pipe(
        [s.caption() for s in scenes],
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    found = Inspector.load(ZOO / "inspector").detect(images * 2 - 1)
    right = [is_right(s, f).all for s, f in zip(scenes, found, strict=True)]
    assert sum(right) >= 10


@pytest.mark.parametrize("name", model_names())
def test_shipped_weights_are_bf16_safetensors(name: str) -> None:
    folder = zoo_folder(name)
    files = list(folder.rglob("*.safetensors"))
    assert len(files) >= 3
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} == {"BF16"}
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_zoo_fits_the_repository() -> None:
    size = sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file())
    assert size < 30e6


def test_tokenizer_round_trip() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ZOO / "emoji-parts" / "tokenizer")
    for scene in held_out_scenes(64):
        for language in ("en", "zh"):
            caption = scene.caption(language)  # type: ignore[arg-type]
            ids = tokenizer(caption).input_ids
            assert tokenizer.decode(ids) == caption
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True
            )
            assert chat == f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
            assert len(tokenizer(chat).input_ids) <= 32
