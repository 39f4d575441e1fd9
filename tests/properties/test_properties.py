"""What holds for every schedule, rollout, prompt file and override, on examples that hypothesis finds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twostep.data.prompt_text import PromptError, lines_of
from twostep.data.prompts import load_prompts
from twostep.errors import RecipeError, UserError
from twostep.method.flow import shift_sigma, unshift_sigma
from twostep.method.rollout import euler, two_step
from twostep.method.schedule import Schedule, sigma_schedule
from twostep.recipe.rules import flatten
from twostep.recipe.schema import Recipe

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
shifts = st.floats(0.05, 50)
inner = st.floats(0.02, 0.98)
# Text that a file can hold: no NUL, no half of a character.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@few
@given(st.integers(1, 60), shifts)
def test_every_schedule_descends_from_1_to_0(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (pytest.approx(1.0), 0.0, steps + 1)
    assert all(a > b for a, b in pairwise(sigmas))
    for i, sigma in enumerate(sigmas[:-1]):
        t = 1 - i / steps
        assert sigma == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-5)
        assert float(unshift_sigma(sigma, shift)) == pytest.approx(t, abs=1e-5)


@few
@given(shifts, inner, st.integers(0, 2**32))
def test_what_is_drawn_lies_within_its_bounds(shift: float, bound: float, seed: int) -> None:
    schedule = Schedule.of(shift)
    generator = torch.Generator().manual_seed(seed)
    low = schedule.draw(50, generator, (0.0, bound))
    high = schedule.draw(50, generator, (bound, 1.0))
    assert 0 <= float(low.min()) <= float(low.max()) <= bound + 1e-5
    assert bound - 1e-5 <= float(high.min()) <= float(high.max()) <= 1 + 1e-6
    assert float(shift_sigma(unshift_sigma(bound, shift), shift)) == pytest.approx(bound, rel=1e-5)


def straight(target: Tensor) -> object:
    """The field whose every path is a straight line to `target`."""
    return lambda latents, sigma: (latents - target) / sigma.view(-1, 1, 1, 1)


@few
@given(shifts, inner, st.sampled_from(["euler", "renoise"]), st.integers(0, 2**32))
def test_straight_paths_end_where_they_point_to(
    shift: float, sigma: float, transition: str, seed: int
) -> None:
    torch.manual_seed(seed)
    noise, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    field = straight(target)
    found = two_step(field, field, noise, Schedule(shift, sigma, transition))  # type: ignore[arg-type]
    torch.testing.assert_close(found.clean1, target, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.clean2, target, atol=1e-3, rtol=1e-3)
    if transition == "euler":
        torch.testing.assert_close(found.latents2, target + sigma * (noise - target))
    many = euler(field, noise, sigma_schedule(5, shift))  # type: ignore[arg-type]
    torch.testing.assert_close(many, target, atol=1e-3, rtol=1e-3)


@few
@given(inner, st.booleans())
def test_the_gradient_reaches_step_1_end_to_end_alone(sigma: float, end_to_end: bool) -> None:
    scale = torch.ones((), requires_grad=True)

    def first(latents: Tensor, _: Tensor) -> Tensor:
        return scale * latents

    def second(latents: Tensor, _: Tensor) -> Tensor:
        return latents

    noise = torch.ones(1, 1, 2, 2)
    found = two_step(first, second, noise, Schedule(3.0, sigma), end_to_end=end_to_end)
    total = found.clean2.sum() + 0 * scale
    total.backward()
    # clean2 = (1 - sigma) latents2, latents2 = noise - (1 - sigma) scale noise.
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(-4 * (1 - sigma) ** 2 * end_to_end, abs=1e-5)


@few
@given(st.lists(texts, max_size=5))
def test_lines_come_back_as_they_were_written(tmp_path: Path, written: Sequence[str]) -> None:
    path = tmp_path / "prompts.txt"
    lines = [text.replace("\n", " ") for text in written]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    expected = [line.rstrip("\r\n") for line in lines]
    if expected and expected[0].startswith("\ufeff"):
        expected[0] = expected[0].removeprefix("\ufeff")
    assert [text for _, text in lines_of(path)] == expected


@few
@given(st.lists(texts.filter(lambda t: bool(t.strip())), min_size=1, max_size=5), st.booleans())
def test_prompts_of_json_lines_come_back(
    tmp_path: Path, written: Sequence[str], plain: bool
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=plain) for text in written]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert list(load_prompts(str(path))) == list(dict.fromkeys(t.strip() for t in written))


@few
@given(st.binary(max_size=60), st.sampled_from([".txt", ".jsonl"]))
def test_no_bytes_break_a_prompt_file(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    try:
        prompts = load_prompts(str(path))
    except PromptError as error:
        prompts, said = [], str(error)
    else:
        said = ""
    # Either one of both: prompts, or a sentence that names the file.
    assert bool(prompts) != (str(path) in said)
    assert all(isinstance(p, str) and p == p.strip() and "\0" not in p for p in prompts)


KEYS = sorted(flatten(Recipe.load("zoo:emoji-demo").model_dump(mode="python")))


@few
@given(st.sampled_from(KEYS), st.one_of(texts, st.integers().map(str), st.floats().map(str)))
def test_any_override_gives_a_recipe_or_a_sentence(key: str, value: str) -> None:
    try:
        recipe, said = Recipe.load("zoo:emoji-demo", [f"{key}={value}"]), ""
    except RecipeError as error:
        recipe, said = None, str(error)
    assert (recipe is None) == (0 < len(said) < 2500)
    if recipe is not None:
        assert Recipe.parse(recipe.model_dump(mode="json")) == recipe


@few
@given(texts)
def test_any_recipe_text_gives_a_recipe_or_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError):  # none of them names a teacher
        Recipe.load(path)
