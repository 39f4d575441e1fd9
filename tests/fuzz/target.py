"""A fuzz target: bytes as each small file that is read of somebody else's folder.

python tests/fuzz/target.py --seconds 60 --seed 1     # mutates corpus/, keeps what breaks

Whatever the bytes, a reader gives a value or a `UserError`, in a second at most.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from twostep.distill import soundness
from twostep.distill.checkpoint import read_facts
from twostep.distill.monitor import read_metrics
from twostep.distill.run_folder import RunFolder
from twostep.errors import UserError
from twostep.families import FAMILIES
from twostep.models.configurations import check_configurations
from twostep.models.foreign import check_folder
from twostep.models.student_index import StudentIndex
from twostep.runtime.checked_tensors import TensorFile, load_checked
from twostep.runtime.checksums import check_sums, verify
from twostep.runtime.locks import Holder

CORPUS = Path(__file__).with_name("corpus")
_WORDS = (
    b"null", b"true", b"NaN", b"-1", b"1e999", b"[]", b"{}", b'""', b'"../../x"', b"\xff\xfe", b"[" * 3000,
    b"9" * 5000, b"\x00", b'"auto_map": {}', b'"\\ud800"', b"\xe2\x80\xa8", b"18446744073709551616",
)  # fmt: skip


def _configurations(folder: Path) -> None:
    for family in FAMILIES.values():
        check_configurations(folder, family)


def _tensors(path: Path) -> None:
    load_checked(path)
    file = TensorFile(path)
    for name in ("latents", "offsets", "embeds"):
        if name in file:
            file.rows(name, 0, 2)


# By file: where the bytes are written, and who reads them.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "model_index.json": ("model_index.json", StudentIndex.read),
    "twostep.json": ("twostep.json", StudentIndex.read),
    "transformer.json": ("transformer/config.json", _configurations),
    "vae.json": ("vae/config.json", _configurations),
    "scheduler.json": ("scheduler/scheduler_config.json", _configurations),
    "checksums.json": ("checksums.json", verify),
    "sums.json": ("sums.json", check_sums),
    "manifest.json": ("manifest.json", soundness.check),
    "weights.index.json": ("transformer/x.safetensors.index.json", check_folder),
    "tensors.safetensors": ("tensors.safetensors", lambda f: _tensors(f / "tensors.safetensors")),
    "weights.safetensors": ("transformer/weights.safetensors", check_folder),
    "state.json": ("state.json", read_facts),
    "run.json": ("run.json", lambda f: RunFolder(f).is_ours()),
    "metrics.jsonl": ("metrics.jsonl", read_metrics),
    "lock.json": (".lock-holder.json", Holder.of),
}


def read(kind: str, content: bytes, folder: Path) -> None:
    """Raises whatever a reader raises but a UserError."""
    place, reader = READERS[kind]
    for each in READERS:  # a sound folder around it
        path = folder / READERS[each][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if each in ("transformer.json", "vae.json", "scheduler.json"):
            path.write_bytes((CORPUS / each).read_bytes())
    for part in ("text_encoder", "transformer_2"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_bytes((CORPUS / "transformer.json").read_bytes())
    for name in ("first.safetensors", "second.safetensors"):
        (folder / name).write_bytes((CORPUS / "tensors.safetensors").read_bytes())
    path = folder / place
    path.write_bytes(content)
    started = time.monotonic()
    try:
        reader(folder)
    except UserError:
        pass
    finally:
        path.unlink()
        if (CORPUS / kind).is_file() and kind in ("transformer.json", "vae.json", "scheduler.json"):
            path.write_bytes((CORPUS / kind).read_bytes())
    assert time.monotonic() - started < 5, f"{kind}: slow"


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or replaced by a word that readers stumble over."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        way = draw.randrange(5)
        if way == 0 and found:
            found[min(place, len(found) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            del found[place : place + draw.randint(1, 20)]
        elif way == 2:
            found[place:place] = found[place : place + draw.randint(1, 40)]
        elif way == 3:
            found[place : place + draw.randint(0, 10)] = draw.choice(_WORDS)
        else:
            del found[place:]
    return bytes(found)


def main() -> None:
    """Mutates the corpus for a while; what breaks a reader is kept and named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    until, count, broken = time.monotonic() + options.seconds, 0, 0
    while time.monotonic() < until:
        kind = draw.choice(sorted(READERS))
        content = mutated((CORPUS / kind).read_bytes(), draw)
        folder = Path(tempfile.mkdtemp(prefix="twostep-fuzz-"))
        count += 1
        try:
            read(kind, content, folder)
        except Exception as error:
            broken += 1
            kept = Path(f"broken-{broken}-{kind}")
            kept.write_bytes(content)
            print(f"{kept}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{count} files, {broken} broke a reader")


if __name__ == "__main__":
    main()
