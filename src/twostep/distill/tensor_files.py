"""Named tensors, sharded or whole, in folders of safetensors.

One process writes one file. Several write a file each by torch's distributed checkpointing, whose
own format would run code when it is read; this one does not. Any number of processes can read both.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from twostep.runtime.checksums import SumsError, check_sums, write_sums
from twostep.runtime.distributed import World
from twostep.runtime.files import make_folder, replace_folder, writing
from twostep.runtime.processes import Share


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str, world: World) -> None:
    """Writes `folder/name`, or among several processes a file for each. `folder` must exist."""
    if world.size == 1:
        save_file(_copies(tensors), folder / name)
        return
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def save_in_background(
    tensors: Mapping[str, Tensor], folder: Path, name: str, world: World
) -> Future[Any]:
    """As `save_tensors`, but only copies at once and writes while the caller goes on.

    The first process's future is done when every process has written.
    """
    if world.size == 1:
        pool = ThreadPoolExecutor(1)
        future = pool.submit(save_file, _copies(tensors), folder / name)
        pool.shutdown(wait=False)  # ends with the file
        return future
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # In a group of its own: a thread's messages must not mix with training's.
    group = world.background_group()
    found = dcp.async_save(dict(tensors), storage_writer=writer, process_group=group)
    assert isinstance(found, Future)
    return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, with memory of their own: safetensors refuses tensors that share storage."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}


def save_folder(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Replaces `folder` by one that holds `tensors`; every process must call it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
    world.wait()
    with writing(folder):
        save_tensors(tensors, temporary, "weights.safetensors", world)
        if world.is_first:
            write_sums(temporary)
            replace_folder(temporary, folder)
    world.wait()


def check_whole(folder: Path) -> None:
    """Raises SumsError if a file of a folder is not as it was written; one process looks."""
    if Share.here().is_first:
        for path in folder.iterdir():
            if path.exists() and not path.is_file():
                raise SumsError(f"{path} is no ordinary file")
        check_sums(folder)


def load_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills `tensors` in place from what `save_tensors` wrote, which `check_whole` looked at.

    Raises:
        ValueError: if the files do not hold these tensors, in the words of torch's reader.
    """
    with warnings.catch_warnings():
        # Alone it says that no process group is there; that is meant.
        warnings.simplefilter("ignore", UserWarning)
        state = {key: value.detach() for key, value in tensors.items()}
        try:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        except CheckpointException as error:  # no Exception, and a traceback in its text
            said = "; ".join(str(failed[0]) for failed in error.failures.values())
            raise ValueError(said[:300]) from error


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in `folder`."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names
