"""How many graphs a run of many shapes and roles needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from tiny import TEXT_WIDTH, as_velocity, random_transformer
from twostep.distill.objectives.roles import Role
from twostep.families.family import PromptBatch
from twostep.families.zimage import ZImage
from twostep.models.adapters import SharedBackbone
from twostep.models.compiling import allow_graphs, compile_blocks
from twostep.recipe.models import Student

ROLES = ["first", "second", "fake1", "fake2", "score"]
# Latents of five picture sizes, captions of two buckets: ten shapes.
SIZES, CAPTIONS = [(8, 8), (8, 16), (16, 8), (12, 16), (16, 12)], [5, 40]


def test_ten_shapes_and_six_roles_take_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up after its limit of graphs for one piece of code; ours must not depend on it.

    Two kinds of blocks, adapters on or off, fixed shapes once and any shapes after.
    """
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch._dynamo.reset()
    model = as_velocity(random_transformer())
    shared = SharedBackbone(model, ROLES, rank=2, target_modules=Student().target_modules, seed=0)
    compile_blocks(ZImage().blocks(model))
    roles = [Role.adapter(shared, name) for name in ("", *ROLES)]
    after: list[int] = []
    for (rows, columns), tokens in product(SIZES, CAPTIONS):
        prompts = PromptBatch.collate([torch.randn(tokens, TEXT_WIDTH)])
        for role in roles:
            with torch.no_grad():
                role(torch.randn(1, 8, rows, columns), torch.full((1,), 0.5), prompts)
        after.append(len(graphs))
    assert 0 < after[-1] <= 12
    # The last shapes bring nothing new.
    assert after[-1] == after[len(SIZES)]


def test_a_compiled_network_taps_the_layers_that_are_asked_for() -> None:
    """Whatever was asked for before: torch leaves a number open once it has seen two values of it."""
    torch._dynamo.reset()
    allow_graphs()
    model = as_velocity(random_transformer())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    prompts = PromptBatch.collate([torch.randn(5, TEXT_WIDTH)])
    latents, sigma = torch.randn(1, 8, 8, 8), torch.full((1,), 0.5)
    with torch.no_grad():
        for taps in ((0, 1), (1,), (2,), (0, 2), (), (1, 2), (0, 1)):
            expected, found = (f(latents, sigma, prompts, taps).hidden for f in (model, compiled))
            assert len(found) == len(taps)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
