"""A student's folder is written without ever holding both of its transformers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tiny import random_transformer
from twostep.method.schedule import Schedule
from twostep.models.student import write_student
from twostep.models.transformer import whole_transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_transformer_is_asked_for_when_the_first_is_gone(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    made: list[weakref.ref[nn.Module]] = []

    def steps() -> Iterator[nn.Module]:
        for seed in (1, 2):
            gc.collect()
            assert all(ref() is None for ref in made)
            transformer = random_transformer(seed)
            made.append(weakref.ref(transformer))
            yield transformer
            del transformer

    folder = tmp_path / "student"
    write_student(tiny_folder, steps(), schedule=Schedule(3.0, 0.75), folder=folder, dtype=dtype)
    assert len(made) == 2
    for seed, part in ((1, "transformer"), (2, "transformer_2")):
        (path,) = (folder / part).glob("*.safetensors")
        stored, expected = load_file(path), random_transformer(seed).state_dict()
        assert stored.keys() == expected.keys()
        assert all(torch.equal(v, expected[k].to(dtype)) for k, v in stored.items())


def test_a_process_that_only_helps_keeps_nothing() -> None:
    transformer = random_transformer(1)
    assert whole_transformer(transformer, keep=False) is None
    whole = whole_transformer(transformer).state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in transformer.state_dict().items())
