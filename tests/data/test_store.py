"""A cache in an object store: fsspec's memory and local file systems, and an S3 server here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from twostep.data.cache import store as stores
from twostep.data.cache.build import open_cache
from twostep.data.cache.read import TeacherCache
from twostep.data.cache.spec import CacheSpec
from twostep.data.cache.store import CacheError
from twostep.distill.order import Order
from twostep.distill.trainer import Trainer
from twostep.errors import RecipeError
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


def at(make_recipe: Make, url: str, copies: Path, **data: Any) -> Recipe:
    return make_recipe(data={"cache": url, "cache_copies": str(copies), **data})


def test_urls_stay_as_typed_and_folders_are_paths(make_recipe: Make) -> None:
    assert make_recipe(data={"cache": "s3://bucket/a"}).data.cache == "s3://bucket/a"
    assert make_recipe(data={"cache": "a/b"}).data.cache == Path("a/b")
    recipe = make_recipe(data={"cache": "gs://bucket/a//b"})
    assert "cache: gs://bucket/a//b" in recipe.to_yaml()


def test_what_cannot_be_opened_is_named_before_anything_is_loaded(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match=r"data\.cache: nothing://x cannot be opened: .*nothing"):
        CacheSpec.of(make_recipe(data={"cache": "nothing://x"}))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_store_holds_what_a_folder_does(
    kind: str, make_recipe: Make, tmp_path: Path, memory: Any
) -> None:
    local = open_cache(make_recipe())
    url = "memory://bucket/cache" if kind == "memory" else f"file://{tmp_path}/bucket/cache"
    recipe = at(make_recipe, url, tmp_path / "copies")
    built = open_cache(recipe)
    fs, root = fsspec.core.url_to_fs(url)
    names = sorted(Path(name).name for name in fs.ls(root, detail=False))
    shards = [f"shard-0000{i}.{suffix}" for i in range(3) for suffix in ("json", "safetensors")]
    assert names == ["empty.safetensors", "manifest.json", *shards]
    for cache in (built, open_cache(at(make_recipe, url, tmp_path / "elsewhere"))):
        ours, theirs = (c.read([23, 0, 9, 4]) for c in (cache, local))
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.noise, theirs.noise)
        assert ours.prompts == theirs.prompts
        assert all(torch.equal(a, b) for a, b in zip(ours.embeds, theirs.embeds, strict=True))
        assert cache.caption_lengths().tolist() == local.caption_lengths().tolist()
        assert torch.equal(cache.empty_embeds, local.empty_embeds)
        assert cache.files_at_once() is None
    # The records alone are fetched until samples are read.
    fresh = open_cache(at(make_recipe, url, tmp_path / "third"))
    assert not list(fresh.spec.folder.glob("shard-*.safetensors"))


def test_training_from_a_store_is_training_from_a_folder(
    make_recipe: Make, tmp_path: Path, memory: Any
) -> None:
    losses = []
    for name, cache in (("here", tmp_path / "cache"), ("there", "memory://bucket/cache")):
        data = {"cache": str(cache), "cache_copies": str(tmp_path / "copies")}
        recipe = make_recipe(
            name, data=data, training={"turns": 3, "validate_every": 9, "validation_samples": 2}
        )
        Trainer(recipe, open_cache(recipe)).train()
        lines = (recipe.run_folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_an_interrupted_build_goes_on(make_recipe: Make, tmp_path: Path, memory: Any) -> None:
    """A spot machine that dies leaves whole shards; a shard without its record is none."""
    recipe = at(make_recipe, "memory://bucket/cache", tmp_path / "copies")
    whole = open_cache(recipe).read(range(24)).latents
    for name in (
        "manifest.json",
        "shard-00001.json",
        "shard-00002.safetensors",
        "shard-00002.json",
    ):
        memory.rm(f"/bucket/cache/{name}")
    before = memory.info("/bucket/cache/shard-00000.safetensors")["created"]
    again = at(make_recipe, "memory://bucket/cache", tmp_path / "another-machine")
    with pytest.raises(CacheError, match="no finished cache at memory://bucket/cache"):
        TeacherCache(CacheSpec.of(again))
    assert torch.equal(open_cache(again).read(range(24)).latents, whole)
    assert memory.info("/bucket/cache/shard-00000.safetensors")["created"] == before


def test_a_corrupt_object_is_named_and_repaired(
    make_recipe: Make, tmp_path: Path, memory: Any
) -> None:
    recipe = at(make_recipe, "memory://bucket/cache", tmp_path / "copies")
    whole = open_cache(recipe).read(range(24)).latents
    name = "/bucket/cache/shard-00001.safetensors"
    content = bytearray(memory.cat_file(name))
    content[-5] ^= 255
    memory.pipe_file(name, bytes(content))
    other = at(make_recipe, "memory://bucket/cache", tmp_path / "other")
    cache = open_cache(other)
    assert torch.equal(cache.read([0]).latents, whole[:1])
    with pytest.raises(
        CacheError, match=r"memory://.*shard-00001.safetensors is corrupt.*--repair"
    ):
        cache.read([8])
    repaired = open_cache(other, repair=True)
    assert torch.equal(repaired.read(range(24)).latents, whole)
    assert memory.cat_file(name) != bytes(content)
    memory.rm(name)
    with pytest.raises(CacheError, match=r"memory://bucket/cache/shard-00001.safetensors is gone"):
        open_cache(other)


def test_copies_are_bounded_and_the_longest_unread_goes_first(
    make_recipe: Make, tmp_path: Path, memory: Any
) -> None:
    url = "memory://bucket/cache"
    whole = open_cache(at(make_recipe, url, tmp_path / "copies"))
    size = max(memory.info(f"/bucket/cache/shard-0000{i}.safetensors")["size"] for i in range(3))
    room = 2.2 * size / 2**30
    recipe = at(make_recipe, url, tmp_path / "small", cache_copies_gib=room)
    cache = open_cache(recipe)

    def copies() -> list[str]:
        return sorted(p.name for p in cache.spec.folder.glob("shard-*.safetensors"))

    first, second, third = (f"shard-0000{i}.safetensors" for i in range(3))
    for ids, expected in (([0], [first]), ([8], [first, second]), ([16], [second, third])):
        cache.read(ids)
        assert copies() == expected
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 24, 4).tolist()
        assert torch.equal(cache.read(ids).latents, whole.read(ids).latents)
    assert len(copies()) <= 2
    # Samples are drawn from as many files at a time as have room.
    files = cache.files_at_once()
    assert files is not None
    assert (files[0].tolist(), files[1]) == ([0] * 8 + [1] * 8 + [2] * 8, 1)
    order = Order([range(24)], np.ones(24, int), seed=0, files=files)
    batches = [order.batch(t, 4, purpose="student") for t in range(6)]
    assert sorted(i for batch in batches for i in batch) == list(range(24))
    assert all(len({i // 8 for i in batch}) == 1 for batch in batches)


def test_order_draws_from_some_files_at_a_time() -> None:
    files = np.arange(80) // 8
    order = Order([range(10, 70)], np.ones(80, int), seed=0, files=(files, 3))
    epochs = [
        [i for t in range(15 * e, 15 * e + 15) for i in order.batch(t, 4, purpose="student")]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10, 70))
    assert epochs[0] != epochs[1]
    firsts = [list(dict.fromkeys(i // 8 for i in epoch)) for epoch in epochs]
    assert firsts[0] != firsts[1]
    for epoch, seen in zip(epochs, firsts, strict=True):  # 8 files, the first and the last cut
        last = {file: max(p for p, i in enumerate(epoch) if i // 8 == file) for file in seen}
        first = {file: min(p for p, i in enumerate(epoch) if i // 8 == file) for file in seen}
        open_at = [sum(first[f] <= p <= last[f] for f in seen) for p in range(len(epoch))]
        assert max(open_at) == 3


def test_shards_come_ahead(make_recipe: Make, tmp_path: Path, memory: Any) -> None:
    url = "memory://bucket/cache"
    open_cache(at(make_recipe, url, tmp_path / "copies"))
    cache = open_cache(at(make_recipe, url, tmp_path / "other"))
    cache.ahead([9, 17])
    store = cache.spec.store
    assert isinstance(store, stores.ObjectStore)
    store._threads.shutdown(wait=True)
    names = sorted(p.name for p in store.folder.glob("shard-*.safetensors"))
    assert names == ["shard-00001.safetensors", "shard-00002.safetensors"]


def test_an_s3_server(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("flask_cors")
    server_of = pytest.importorskip("moto.moto_server.threaded_moto_server").ThreadedMotoServer
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        local = open_cache(make_recipe())
        url = "s3://bucket/runs/cache"
        open_cache(at(make_recipe, url, tmp_path / "copies"))
        fs.invalidate_cache()
        assert len(fs.ls("bucket/runs/cache")) == 8
        cache = open_cache(at(make_recipe, url, tmp_path / "other"))
        ids = list(range(24))
        assert torch.equal(cache.read(ids).latents, local.read(ids).latents)
        server.stop()
        with pytest.raises(
            CacheError, match=r"data\.cache: s3://bucket/runs/cache/manifest.json: "
        ):
            open_cache(at(make_recipe, url, tmp_path / "other"))
    finally:
        server.stop()
