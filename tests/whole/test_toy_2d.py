"""The toy in examples/: its closed-form teacher, and that a short distillation works."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOY = Path(__file__).parents[2] / "examples" / "toy_2d.py"


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_2d", TOY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_2d"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only lose time to a second thread: minutes, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_velocity_of_one_gaussian(toy: ModuleType) -> None:
    """The conditional mean of a jointly Gaussian pair, written out."""
    mean, std = torch.tensor([1.5, -0.5]), 0.4
    sigma = torch.tensor([0.0, 0.2, 0.75, 1.0])
    latents = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    points, s = latents.flatten(1), sigma[:, None]
    gain = (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)
    expected = gain * (points - (1 - s) * mean) - mean
    velocity = toy.Mixture(torch.ones(1), mean[None], std).velocity(latents, sigma)
    torch.testing.assert_close(velocity.flatten(1), expected)


@pytest.mark.parametrize("level", [0.15, 0.5, 0.9])
def test_velocity_agrees_with_the_score(toy: ModuleType, level: float) -> None:
    """Tweedie: clean = (x + sigma^2 * grad log p) / (1 - sigma), the gradient by autograd."""
    mixture = toy.ring()
    generator = torch.Generator().manual_seed(1)
    latents = (3 * torch.randn(64, 2, 1, 1, generator=generator)).double().requires_grad_()
    std = ((1 - level) ** 2 * mixture.std**2 + level**2) ** 0.5
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights.double()),
        torch.distributions.Independent(
            torch.distributions.Normal((1 - level) * mixture.means.double(), std), 1
        ),
    )
    (score,) = torch.autograd.grad(density.log_prob(latents.flatten(1)).sum(), latents)
    latents = latents.detach()
    clean = (latents + level**2 * score) / (1 - level)
    velocity = mixture.velocity(latents, torch.full((64,), level, dtype=torch.float64))
    torch.testing.assert_close(velocity, (latents - clean) / level, rtol=1e-4, atol=1e-4)


def test_distance(toy: ModuleType) -> None:
    """Zero to itself; a shift by d moves every projection by d |cos|, 2 d / pi on average."""
    points = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    moved = points + torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    assert toy.sliced_distance(points, points) == 0
    assert toy.sliced_distance(points, moved) == pytest.approx(4 / torch.pi, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_short_run_closes_most_of_the_gap(toy: ModuleType, tmp_path: Path) -> None:
    figures = toy.run(turns=150, seed=0, out=tmp_path)
    assert figures["naive_2"] > 10 * figures["floor"]
    assert figures["gap_closed"] > 0.6
    assert json.loads((tmp_path / "toy_2d.json").read_text()) == figures
    assert (tmp_path / "toy_2d.png").read_bytes().startswith(b"\x89PNG")
