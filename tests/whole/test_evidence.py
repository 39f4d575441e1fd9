"""The evidence study: its arithmetic by closed forms, and rows that differ in what they claim."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from twostep.emoji.inspector import GRID, Reading
from twostep.emoji.scenes import BACKGROUND_NAMES, OBJECTS, Scene
from twostep.recipe.schema import Recipe

FOLDER = Path(__file__).parents[2] / "studies" / "evidence"
NAMES = ("claims", "intervals", "judging", "low_level", "one_run", "rows", "second_judge", "worlds")
KINDS, COLOURS = len(OBJECTS), len(BACKGROUND_NAMES)


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The study's modules by name; other studies have modules of the same names."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(FOLDER))
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


def recipe(study: dict[str, ModuleType], name: str, tuned: tuple[str, ...] = ()) -> Recipe:
    world = study["worlds"].World(3, Path("out"))
    return world.recipe(study["rows"].ROWS[name], f"{name}-3", tuned)


def test_every_row_stands_in_a_table_and_every_claim_has_its_rows(
    study: dict[str, ModuleType],
) -> None:
    rows, tables = study["rows"].ROWS, study["rows"].TABLES
    assert {name for table in tables.values() for name in table} == set(rows)
    claims = study["claims"]
    for claim in claims.CLAIMS:
        for name in (claim.better, claim.worse):
            assert rows[name].seeds == study["rows"].SEEDS, name
    assert set(claims.PEERS) == set(tables["peers"]) - {"full"}


def test_rows_differ_in_what_is_claimed_and_in_nothing_else(study: dict[str, ModuleType]) -> None:
    changed = {
        "unpaired": {"critic.paired"},
        "external": {"critic.paired", "data.reals"},
        "external_paired": {"data.reals"},
        "cut": {"student.gradient"},
        "no_step1": {"losses.step1.weight"},
        "cut_no_step1": {"student.gradient", "losses.step1.weight"},
        "shared": {"student.steps"},
        "teacher_score": {"score.model"},
        "no_critic": {"losses.final.adversarial", "losses.step1.adversarial"},
    }
    full = _flat(recipe(study, "full"))
    for name, keys in changed.items():
        other = _flat(recipe(study, name))
        assert {k for k in full if full[k] != other[k]} == keys | {"name"}, name
    pair, shared = _flat(recipe(study, "lora")), _flat(recipe(study, "lora_shared"))
    assert {k for k in pair if pair[k] != shared[k]} == {"name", "student.steps", "student.rank"}
    # As many numbers in one set of twice the rank as in two.
    assert shared["student.rank"] == 2 * pair["student.rank"]


def test_every_row_has_its_world_four_trials_and_its_last_turns_average(
    study: dict[str, ModuleType],
) -> None:
    for name, row in study["rows"].ROWS.items():
        assert len(set(row.trials)) == 4, name
        for trial in row.trials:
            found = recipe(study, name, trial)
            assert found.data.seed == found.training.seed == 3
            assert str(found.data.cache) == "out/worlds/3/cache"
            # The only validation is that of the last turn: no checkpoint is chosen.
            assert found.training.validate_every == found.training.turns
            assert found.losses.warmup_turns == (found.training.turns if row.regression else 0)
            if row.score:
                assert found.score.model == f"out/worlds/3/{row.score}/score"
    worlds = study["worlds"]
    fit = worlds.World(3, Path("out")).fit("fitted", 20)
    assert fit.run_folder == Path("out/worlds/3/fitted")
    assert fit.data.cache == recipe(study, "full").data.cache


def _flat(found: Recipe) -> dict[str, Any]:
    from twostep.recipe.rules import flatten

    return flatten(found.model_dump(mode="json"))


def test_sign_flips_and_holm(study: dict[str, ModuleType]) -> None:
    intervals = study["intervals"]
    assert intervals.sign_flip([1.0] * 8) == 1 / 256
    assert intervals.sign_flip([3.0, -1.0]) == 2 / 4  # +3-1 and +3+1 of four
    assert intervals.sign_flip([-1.0, -2.0]) == 1
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_interval_of_a_difference(study: dict[str, ModuleType]) -> None:
    """Where pictures do not vary, it is that of the seeds alone, which normal theory knows."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 2)
    worse = rng.normal(size=(8, 100))
    of_seed = np.linspace(0.1, 0.3, 8)[:, None]
    found = study["intervals"].difference(worse + of_seed, worse, groups)
    assert found.mean == pytest.approx(0.2)
    assert (found.ahead, found.seeds, found.p) == (8, 8, 1 / 256)
    error = of_seed.std(ddof=1) / math.sqrt(8)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    # Scenes are drawn whole: pictures of one scene are no further evidence.
    per_scene = np.repeat(rng.normal(size=(1, 50)), 2, axis=1)
    repeated = study["intervals"].difference(worse + per_scene, worse, groups)
    single = study["intervals"].difference(worse + per_scene, worse, np.arange(100))
    assert repeated.high - repeated.low > 1.2 * (single.high - single.low)


def test_power_at_high_frequencies(study: dict[str, ModuleType]) -> None:
    """A chequerboard of amplitude a: all its power, a^2 N^2 of N cells' squared, at the corner."""
    row = torch.arange(8)
    board = ((row[:, None] + row[None]) % 2).float().mul(2).sub(1) * 0.5
    image = board.expand(1, 3, 8, 8)
    radius = torch.hypot(torch.fft.fftfreq(8)[:, None], torch.fft.fftfreq(8)[None])
    cells = int((radius > 0.25).sum())
    expected = math.log((0.5 * 64) ** 2 / cells)
    found = study["low_level"].high_frequency_power(image)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    flat = study["low_level"].high_frequency_power(torch.full((1, 3, 8, 8), 0.3))
    assert flat.item() < -20


def test_the_second_judges_likelihood(study: dict[str, ModuleType]) -> None:
    judge = study["second_judge"]
    counts = torch.full((2, KINDS, judge.COUNTS), 0.1)
    counts[:, :, 0] = 0.7
    counts[0, 5] = torch.tensor([0.1, 0.2, 0.6, 0.1])
    centres = torch.zeros(2, KINDS, 2)
    centres[1, 3, 0], centres[1, 7, 0] = 0.2, 0.5
    colours = torch.full((2, COLOURS), 0.5 / (COLOURS - 1))
    colours[:, 2] = 0.5
    opinion = judge.Opinion(counts.log(), centres, colours.log())
    scenes = [Scene((5, 5), 2), Scene((3, 7), 2, "left of")]
    found = judge.log_likelihood(opinion, scenes)
    two = math.log(0.6) + (KINDS - 1) * math.log(0.7) + math.log(0.5)
    apart = -math.log1p(math.exp(-(0.3 - 0.1) / 0.05))
    beside = 2 * math.log(0.1) + (KINDS - 2) * math.log(0.7) + math.log(0.5) + apart
    assert found.tolist() == pytest.approx([two, beside], rel=1e-5)
    first, second = judge.verdicts(opinion, scenes)
    assert first.all
    assert (second.objects, second.count, second.relation) == (False, False, True)
    # What is out of the question costs no more than its floor.
    hopeless = judge.Opinion(counts.log(), centres, torch.full((2, COLOURS), -50.0))
    assert judge.log_likelihood(hopeless, scenes[:1])[0] == pytest.approx(
        two - math.log(0.5) - 7, rel=1e-5
    )


def test_the_inspectors_likelihood(study: dict[str, ModuleType]) -> None:
    logits = torch.full((1, KINDS, GRID, GRID), -9.0)
    logits[0, 4, 2, 2], logits[0, 4, 10, 10] = 2.0, 1.0
    colours = torch.zeros(1, COLOURS)
    reading = Reading(logits, colours, torch.zeros(1, 1))
    log_likelihood = study["judging"].log_likelihood
    colour = -math.log(COLOURS)

    def there(x: float) -> float:
        return -math.log1p(math.exp(-x))

    # A plateau is as high as its neighbours: one more peak at -9 for every kind.
    others = KINDS * there(9.0)
    two = log_likelihood(reading, [Scene((4, 4), 1)])
    assert two.item() == pytest.approx(there(2.0) + there(1.0) + others + colour, rel=1e-5)
    one = log_likelihood(reading, [Scene((4,), 1)])
    assert one.item() == pytest.approx(
        there(2.0) + there(-1.0) + others - there(9.0) + colour, rel=1e-5
    )
