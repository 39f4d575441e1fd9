from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from twostep.data.cache import shards
from twostep.data.cache.build import build, open_cache
from twostep.data.cache.encoded import EncodedPrompts
from twostep.data.cache.read import TeacherCache
from twostep.data.cache.shards import CacheError
from twostep.data.cache.spec import CacheSpec
from twostep.data.prompts import PromptError, load_prompts
from twostep.distill.order import Order
from twostep.errors import RecipeError, UserError
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.rollout import euler
from twostep.method.schedule import sigma_schedule
from twostep.models.folder import ModelFolder
from twostep.models.prompt_encoder import PromptEncoder
from twostep.models.velocity import bind
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.images import pictures_at_once

Make = Callable[..., Recipe]


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    return make_recipe()


def shard(recipe: Recipe, number: int, suffix: str = "safetensors") -> Path:
    return recipe.data.cache / f"shard-{number:05d}.{suffix}"


def test_samples_are_the_teachers(recipe: Recipe) -> None:
    cache = open_cache(recipe)
    assert len(cache) == 24
    assert len(list(recipe.data.cache.glob("shard-*.safetensors"))) == 3
    samples = cache.read([23, 0, 9])
    sampler = Sampler.load(recipe.teacher.model)
    expected = sampler.sample(samples.prompts, samples.noise, steps=4).latents
    torch.testing.assert_close(samples.latents, expected, atol=1e-4, rtol=1e-4)
    for embeds, prompt in zip(samples.embeds, samples.prompts, strict=True):
        torch.testing.assert_close(
            embeds, sampler.encoder.encode([prompt])[0], atol=1e-5, rtol=1e-4
        )


def test_the_teacher_computes_in_its_dtype(make_recipe: Make) -> None:
    cache = open_cache(make_recipe(teacher={"dtype": "bfloat16"}))
    assert cache.spec.fingerprint != CacheSpec.of(make_recipe()).fingerprint
    samples = cache.read([23, 0, 9])
    assert all(e.dtype == torch.bfloat16 for e in samples.embeds)
    half = Placement(torch.device("cpu"), torch.bfloat16)
    sampler = Sampler.load(cache.spec.teacher, placement=half)
    expected = sampler.sample(samples.prompts, samples.noise, steps=4).latents
    torch.testing.assert_close(samples.latents, expected, atol=0.05, rtol=0.05)


def test_the_text_encoder_is_gone_before_the_transformer_comes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[Any]] = []
    load, velocities = AutoModel.from_pretrained, ModelFolder.velocities

    def watched(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)  # the model, and what its files lacked
        encoders.append(weakref.ref(found[0]))
        return found

    def alone(self: ModelFolder, placement: Placement) -> Any:
        gc.collect()
        assert [ref() for ref in encoders] == [None]
        return velocities(self, placement)

    monkeypatch.setattr(AutoModel, "from_pretrained", watched)
    monkeypatch.setattr(ModelFolder, "velocities", alone)
    open_cache(recipe)
    assert len(encoders) == 1


@pytest.mark.parametrize(
    ("size", "batch"), [((64, 64), 64), ((256, 256), 64), ((512, 512), 16), ((1024, 1024), 4)]
)
def test_batches_shrink_with_the_picture(size: tuple[int, int], batch: int) -> None:
    assert pictures_at_once(*size) == batch
    assert pictures_at_once(2048, 4096) == 1


def test_trajectory_is_the_teachers_latents_at_the_second_noise_level(recipe: Recipe) -> None:
    samples = open_cache(recipe).read([5])
    sampler = Sampler.load(recipe.teacher.model)
    sigmas = sigma_schedule(4, 3.0)
    assert sigmas[2] == pytest.approx(0.75)
    with torch.no_grad():
        field = bind(sampler.velocities[0], PromptBatch.collate(samples.embeds))
        expected = euler(field, samples.noise, sigmas[:3])
    assert samples.trajectory is not None
    torch.testing.assert_close(samples.trajectory, expected, atol=1e-5, rtol=1e-5)


def test_seeds_of_one_prompt_share_its_embedding_and_differ_in_noise(recipe: Recipe) -> None:
    cache = open_cache(recipe)
    a, b = cache.read([6]), cache.read([7])
    assert a.prompts == b.prompts
    assert not torch.equal(a.noise, b.noise)
    tensors = load_file(shard(recipe, 0))
    assert len(tensors["offsets"]) == 5  # four prompts, eight samples


def whole_order(cache: TeacherCache) -> Order:
    """Of all samples, none held out."""
    spec = cache.spec
    sizes = [spec.samples_of(place) for place in range(len(spec.sizes))]
    return Order(sizes, cache.caption_lengths(), seed=0)


def test_order_is_a_permutation_each_epoch_and_a_function_of_the_turn(recipe: Recipe) -> None:
    order = whole_order(open_cache(recipe))
    epochs = [
        [i for turn in range(6 * e, 6 * e + 6) for i in order.batch(turn, 4, purpose="student")]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    again = whole_order(TeacherCache(CacheSpec.of(recipe)))
    assert order.batch(3, 4, purpose="student") == again.batch(3, 4, purpose="student")
    assert order.batch(3, 4, purpose="student") != order.batch(3, 4, purpose="critic")


SIZES = {"other_sizes": [[32, 64], [64, 32]]}


def test_sizes_share_the_prompts_and_every_batch_is_of_one(make_recipe: Make) -> None:
    recipe = make_recipe(data={**SIZES, "prompt_count": 13, "samples_per_file": 4})
    cache = open_cache(recipe)
    plan, order = cache.spec, whole_order(cache)
    assert sorted(plan.prompts) == sorted(
        CacheSpec.of(make_recipe(data={"prompt_count": 13})).prompts
    )
    assert [len(plan.samples_of(place)) for place in range(3)] == [10, 8, 8]
    assert {shard.size for shard in plan.shards} == {(32, 32), (32, 64), (64, 32)}
    seen: list[tuple[int, ...]] = []
    for turn in range(6):
        ids = order.batch(turn, 4, purpose="student")
        assert len(set(ids)) == 4
        seen.append(tuple(cache.read(ids).latents.shape[2:]))
    for block in (seen[:3], seen[3:]):  # each size takes its turn
        assert sorted(block) == [(8, 8), (8, 16), (16, 8)]
    assert len({tuple(seen[:3]), tuple(seen[3:])}) <= 2
    for place, (height, width) in enumerate(plan.sizes):
        ids = [
            i
            for batch in range(len(plan.samples_of(place)))
            for i in order.of_size(place, batch, 1, purpose="student")
        ]
        assert sorted(ids) == list(plan.samples_of(place))
        # The sampler gives the same from the same noise, one by one.
        samples = cache.read(ids[:1])
        assert samples.noise.shape[1:] == (8, height // 4, width // 4)
        again = Sampler.load(recipe.teacher.model).sample(samples.prompts, samples.noise, 4)
        torch.testing.assert_close(again.latents, samples.latents, atol=1e-4, rtol=1e-4)


def test_a_batch_sorted_by_caption_length_pads_less_and_loses_no_sample() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 64)
    plain, window = (Order([range(64)], lengths, seed=0, window=w) for w in (1, 4))

    def padded(order: Order) -> int:
        return sum(
            int(lengths[order.batch(turn, 4, purpose="student")].max()) * 4 for turn in range(16)
        )

    assert padded(window) < 0.8 * padded(plain)
    epochs = [
        [i for t in range(16 * e, 16 * e + 16) for i in window.batch(t, 4, purpose="student")]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1]
    # Lengths come in no order of their own.
    means = [lengths[window.batch(turn, 4, purpose="student")].mean() for turn in range(16)]
    assert means != sorted(means)


def test_caption_lengths_are_those_of_the_embeddings(recipe: Recipe) -> None:
    cache = open_cache(recipe)
    embeds = cache.read(range(24)).embeds
    assert cache.caption_lengths().tolist() == [len(e) for e in embeds]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"other_sizes": [[32, 32]]}, r"must differ from each other and from height and width"),
        ({"other_sizes": [[32, 36]]}, r"width must be a positive multiple of 8, got 36"),
        ({"other_sizes": [[32, 64]], "prompt_count": 1}, r"2 sizes need as many prompts"),
        ({"height": 30}, r"data\.height.*height must be a positive multiple of 8, got 30"),
    ],
)
def test_bad_sizes_are_refused_before_anything_is_loaded(
    make_recipe: Make, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        CacheSpec.of(make_recipe(data=data))


def test_of_several_processes_each_reads_its_own_shards_end_to_end(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(recipe)
    original, read = shards.checksum, []

    def watched(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(shards, "checksum", watched)
    for part in ("velocities", "encoder"):  # nothing to make: no weights are read
        monkeypatch.setattr(ModelFolder, part, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert len(open_cache(recipe)) == 24
    assert sorted(read) == [f"shard-{i:05d}.safetensors" for i in range(3)]
    assert read[-1] == "shard-00001.safetensors"


def test_interrupted_build_goes_on_where_it_stopped(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PromptEncoder._encode

    def only_the_empty_prompt(self: Any, prompts: list[str]) -> list[Tensor]:
        assert prompts == [""]
        return original(self, prompts)

    plan, placement = CacheSpec.of(recipe), Placement.on("cpu")
    (velocity,) = plan.teacher.velocities(placement)
    made = 0

    def stop_in_second_shard(count: int) -> None:
        nonlocal made
        made += count
        if made > 8:
            raise KeyboardInterrupt

    plan.folder.mkdir(parents=True)
    encoded = EncodedPrompts.encode(plan, plan.shards, placement)
    with pytest.raises(KeyboardInterrupt):
        build(
            plan,
            velocity,
            plan.shards,
            encoded=encoded,
            device=placement.device,
            on_samples=stop_in_second_shard,
        )
    assert shard(recipe, 0).exists()
    assert not shard(recipe, 1).exists()
    with pytest.raises(CacheError, match="run `twostep teach RECIPE` first"):
        TeacherCache(plan)
    before = shard(recipe, 0).stat().st_mtime_ns
    # What was encoded is not encoded again, and is gone once it stands in its shard.
    assert len(list(plan.folder.glob("prompts-*"))) == len(plan.shards) - 1
    monkeypatch.setattr(PromptEncoder, "_encode", only_the_empty_prompt)
    cache = open_cache(recipe)
    assert not list(plan.folder.glob("prompts-*"))
    assert shard(recipe, 0).stat().st_mtime_ns == before
    assert len(cache.read(range(24)).ids) == 24


def damage(kind: str, recipe: Recipe) -> None:
    path = shard(recipe, 1)
    data = bytearray(path.read_bytes())
    if kind == "corrupt":
        data[-5] ^= 255
        path.write_bytes(data)
    elif kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "missing":
        path.unlink()
        shard(recipe, 1, "json").unlink()
    elif kind == "gone":
        path.unlink()
    elif kind == "another":
        record = json.loads(shard(recipe, 1, "json").read_text())
        shard(recipe, 1, "json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    elif kind == "not a shard's record":
        shard(recipe, 1, "json").write_text("{")


@pytest.mark.parametrize(
    "kind", ["corrupt", "truncated", "missing", "gone", "another", "not a shard's record"]
)
def test_bad_shard_is_named_and_repaired(recipe: Recipe, kind: str) -> None:
    whole = open_cache(recipe).read(range(24))
    damage(kind, recipe)
    with pytest.raises(CacheError, match=f"shard-00001.*{kind}|{kind}.*shard-00001") as error:
        open_cache(recipe)
    assert "--repair" in str(error.value)
    again = open_cache(recipe, repair=True).read(range(24))
    assert torch.equal(whole.latents, again.latents)


def test_cache_of_another_recipe_is_refused(make_recipe: Make) -> None:
    open_cache(make_recipe())
    other = make_recipe(teacher={"steps": 8})
    with pytest.raises(CacheError, match=r"was made with teacher\.steps or shift"):
        open_cache(other)


def test_fingerprint_follows_the_weights(
    make_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    before = CacheSpec.of(make_recipe(teacher={"model": str(copy)})).fingerprint
    weights = next((copy / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["x_pad_token"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert CacheSpec.of(make_recipe(teacher={"model": str(copy)})).fingerprint != before
    same_elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, same_elsewhere)
    moved = CacheSpec.of(make_recipe(teacher={"model": str(same_elsewhere)})).fingerprint
    assert moved == before


def test_two_processes_share_the_work(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    alone = open_cache(recipe).read(range(24)).latents
    shared = make_recipe(data={"cache": str(tmp_path / "shared")})
    path = tmp_path / "recipe.yaml"
    path.write_text(shared.to_yaml())
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "twostep", "teach", str(path)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [w.wait(timeout=300) for w in workers] == [0, 0]
    torch.testing.assert_close(
        TeacherCache(CacheSpec.of(shared)).read(range(24)).latents, alone, atol=1e-4, rtol=1e-4
    )


def test_prompt_files(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a dog\n\n a cat \na dog\n")
    assert load_prompts(str(text), 10) == ["a dog", "a cat"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "一只狗"}\n{"prompt": "b", "id": 3}\n')
    assert load_prompts(str(lines), 1) == ["一只狗"]
    lines.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl:2: expected an object with a prompt"):
        load_prompts(str(lines), 10)
    assert load_prompts(str(lines), 1, column="prompt") == ["a"]
    lines.write_text('{"text": "b"}\n')
    assert load_prompts(str(lines), column="text") == ["b"]
    with pytest.raises(PromptError, match="holds no prompts"):
        empty = tmp_path / "e.txt"
        empty.write_text("\n")
        load_prompts(str(empty), 1)
    with pytest.raises(PromptError, match=r"expected emoji, parti, hf:OWNER/NAME, or a \.txt"):
        load_prompts("prompts.csv", 1)


def test_parti_prompts_come_with_the_package() -> None:
    prompts = load_prompts("parti")
    assert len(prompts) == 1632
    assert prompts[0] == "bond"
    assert load_prompts("parti", 5) == prompts[:5]


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_prompts_from_parquet_and_from_a_dataset(tmp_path: Path, kind: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = ["a dog", "一只猫", "a dog", " a cow "]
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2, 3, 4]}), path)
    # A folder stands for the hub's name of a dataset.
    source = str(path) if kind == "file" else f"hf:{path.parent}"
    assert load_prompts(source, 10, column="text") == ["a dog", "一只猫", "a cow"]
    assert load_prompts(source, 2, column="text") == ["a dog", "一只猫"]
    with pytest.raises(PromptError, match=r"has no 'prompt'; it has text, id"):
        load_prompts(source, 2)
    with pytest.raises(PromptError, match="id must be a string, got 1"):
        load_prompts(source, 2, column="id")


def test_messages_name_the_option_and_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromptError, match=r"^data\.prompts: no file at a\.txt$"):
        load_prompts("a.txt")
    with pytest.raises(PromptError, match=r"^--prompts: no file at a\.txt$"):
        load_prompts("a.txt", option="--prompts")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    expected = r"^data\.prompts: .*a\.parquet needs this package's extra \"datasets\", for instance"
    with pytest.raises(UserError, match=expected):
        load_prompts(str(tmp_path / "a.parquet"))


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no parquet at all")
    with pytest.raises(PromptError, match="cannot be read as Parquet"):
        load_prompts(str(bad), 1)
    with pytest.raises(PromptError, match="say how many"):
        load_prompts("hf:owner/name")
    with pytest.raises(PromptError, match="split 'train'"):
        load_prompts(f"hf:{tmp_path / 'gone'}", 1)
