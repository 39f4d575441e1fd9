"""Emoji scenes: what prompts ask for, in English and Chinese, and what is held out.

Names follow the labels of `emojibase-data` (MIT), shortened where the label is clumsy
("automobile" is "car"). Nothing here draws; see `render.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Category = Literal["single", "two", "counting", "position"]
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Emoji:
    """One drawable object: its Unicode code point and its names."""

    code: str
    name: str
    plural: str
    name_zh: str
    classifier_zh: str


OBJECTS: tuple[Emoji, ...] = (
    Emoji("1f34e", "apple", "apples", "苹果", "个"),
    Emoji("1f34c", "banana", "bananas", "香蕉", "根"),
    Emoji("1f353", "strawberry", "strawberries", "草莓", "颗"),
    Emoji("1f355", "pizza", "pizzas", "披萨", "块"),
    Emoji("1f369", "doughnut", "doughnuts", "甜甜圈", "个"),
    Emoji("1f436", "dog", "dogs", "狗", "只"),
    Emoji("1f431", "cat", "cats", "猫", "只"),
    Emoji("1f43c", "panda", "pandas", "熊猫", "只"),
    Emoji("1f438", "frog", "frogs", "青蛙", "只"),
    Emoji("1f427", "penguin", "penguins", "企鹅", "只"),
    Emoji("1f41f", "fish", "fish", "鱼", "条"),
    Emoji("1f697", "car", "cars", "汽车", "辆"),
    Emoji("1f68c", "bus", "buses", "公交车", "辆"),
    Emoji("1f680", "rocket", "rockets", "火箭", "枚"),
    Emoji("1f3e0", "house", "houses", "房子", "座"),
    Emoji("1f333", "tree", "trees", "树", "棵"),
    Emoji("2b50", "star", "stars", "星星", "颗"),
    Emoji("2764-fe0f", "heart", "hearts", "红心", "颗"),
    Emoji("1f388", "balloon", "balloons", "气球", "个"),
    Emoji("1f381", "gift", "gifts", "礼物", "份"),
)

# sRGB centres of the background gradients, 0..255
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 69, 65),
    "orange": (242, 150, 60),
    "yellow": (250, 220, 90),
    "green": (90, 180, 100),
    "blue": (80, 140, 220),
    "purple": (150, 100, 200),
    "white": (242, 242, 242),
    "black": (34, 34, 38),
}
BACKGROUND_NAMES: tuple[str, ...] = tuple(BACKGROUNDS)
_BACKGROUND_ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "white": "白色",
    "black": "黑色",
}

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
_RELATION_EN = {"left of": "to the left of", "right of": "to the right of"}
_RELATION_ZH = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}
_COUNT_EN = {2: "two", 3: "three"}
_COUNT_ZH = {2: "两", 3: "三"}
CATEGORIES: tuple[Category, ...] = ("single", "two", "counting", "position")


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for.

    Attributes:
        objects: indices into `OBJECTS`, one per drawn emoji (1 to 3).
        relation: where `objects[0]` lies relative to `objects[1]`, one of `RELATIONS`, or None.
        background: index into `BACKGROUND_NAMES`.
    """

    objects: tuple[int, ...]
    background: int
    relation: str | None = None

    @property
    def category(self) -> Category:
        if self.relation is not None:
            return "position"
        if len(self.objects) == 1:
            return "single"
        return "counting" if len(set(self.objects)) == 1 else "two"

    def caption(self, language: Language = "en", name_background: bool = True) -> str:
        """The prompt, e.g. "a dog to the left of a bus on a red background"."""
        text = self._subject_en() if language == "en" else self._subject_zh()
        if not name_background:
            return text
        colour = BACKGROUND_NAMES[self.background]
        if language == "zh":
            return f"{text}，{_BACKGROUND_ZH[colour]}背景"
        return f"{text} on {_article(colour)} {colour} background"

    def _subject_en(self) -> str:
        first = OBJECTS[self.objects[0]]
        if self.category == "counting":
            return f"{_COUNT_EN[len(self.objects)]} {first.plural}"
        text = f"{_article(first.name)} {first.name}"
        if self.category == "single":
            return text
        second = OBJECTS[self.objects[1]].name
        joint = "and" if self.relation is None else _RELATION_EN.get(self.relation, self.relation)
        return f"{text} {joint} {_article(second)} {second}"

    def _subject_zh(self) -> str:
        first = OBJECTS[self.objects[0]]
        count = _COUNT_ZH[len(self.objects)] if self.category == "counting" else "一"
        text = f"{count}{first.classifier_zh}{first.name_zh}"
        if self.category in ("single", "counting"):
            return text
        second = OBJECTS[self.objects[1]]
        other = f"一{second.classifier_zh}{second.name_zh}"
        if self.relation is None:
            return f"{text}和{other}"
        return f"{text}在{other}的{_RELATION_ZH[self.relation]}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _all_scenes() -> Iterator[Scene]:
    n = range(len(OBJECTS))
    for background in range(len(BACKGROUND_NAMES)):
        for i in n:
            for count in (1, 2, 3):
                yield Scene((i,) * count, background)
        for i, j in itertools.permutations(n, 2):
            for relation in (None, *RELATIONS):
                yield Scene((i, j), background, relation)


def _hold_out() -> tuple[frozenset[frozenset[int]], frozenset[tuple[int, int]]]:
    # A fixed draw: one fifth of the object pairs, one fifth of the (object, background) pairs.
    rng = np.random.default_rng(20261123)
    pairs = [frozenset(p) for p in itertools.combinations(range(len(OBJECTS)), 2)]
    coloured = list(itertools.product(range(len(OBJECTS)), range(len(BACKGROUND_NAMES))))
    chosen = rng.permutation(len(pairs))[: len(pairs) // 5]
    chosen_coloured = rng.permutation(len(coloured))[: len(coloured) // 5]
    return frozenset(pairs[i] for i in chosen), frozenset(coloured[i] for i in chosen_coloured)


HELD_OUT_PAIRS, HELD_OUT_COLOURED = _hold_out()


def is_held_out(scene: Scene) -> bool:
    """True for combinations that no training scene shows.

    Two different objects: the pair decides, in either order and any relation. One kind of
    object: the (object, background) pair decides, for every count.
    """
    kinds = set(scene.objects)
    if len(kinds) == 2:
        return frozenset(kinds) in HELD_OUT_PAIRS
    return (scene.objects[0], scene.background) in HELD_OUT_COLOURED


_TRAINING: dict[Category, list[Scene]] = {c: [] for c in CATEGORIES}
_HELD_OUT: dict[Category, list[Scene]] = {c: [] for c in CATEGORIES}
for _scene in _all_scenes():
    (_HELD_OUT if is_held_out(_scene) else _TRAINING)[_scene.category].append(_scene)


def sample_training_scene(rng: np.random.Generator) -> Scene:
    """A random scene that is not held out; the four categories are equally likely."""
    pool = _TRAINING[CATEGORIES[rng.integers(len(CATEGORIES))]]
    return pool[rng.integers(len(pool))]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` held-out scenes, categories in turn; repeats one only when its category runs out."""
    rng = np.random.default_rng(seed)
    decks = {c: itertools.cycle(rng.permutation(len(_HELD_OUT[c])).tolist()) for c in CATEGORIES}
    order = itertools.cycle(CATEGORIES)
    return [_HELD_OUT[c][next(decks[c])] for c in itertools.islice(order, count)]


def training_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` random scenes that are not held out."""
    rng = np.random.default_rng(seed)
    return [sample_training_scene(rng) for _ in range(count)]
