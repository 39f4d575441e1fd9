"""Cases of `faults.py`: full and read-only disks, kills at every file operation, signals."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from faults import Case
from faults_world import EVALUATE, SMALL

_GENERATE = [
    "generate",
    "--model",
    "run/student",
    "--size",
    "32",
    "--out",
    "new",
    "a dog",
    "two cats",
]
_RESUME = ["distill", *SMALL, "training.turns=3"]
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "generate": (_GENERATE, ("run",)),
    "teach": (["teach", *SMALL, "data.cache=new"], ("teacher",)),
    "distill": (["distill", *SMALL, "name=new"], ("teacher", "cache")),
    "resume": (_RESUME, ("teacher", "cache", "run")),
    "export diffusers": (["export", "--model", "run/student", "--to", "diffusers", "--out", "new"], ("run",)),
    "export lora": (["export", "--model", "run/student", "--to", "lora", "--teacher", "teacher", "--rank", "4", "--out", "new"], ("run", "teacher")),
    "export comfyui": (["export", "--model", "run/student", "--to", "comfyui", "--out", "new"], ("run",)),
    "average": (["average", "run/student", "run/student", "--out", "new"], ("run",)),
    "evaluate": ([a if a != "checked" else "new" for a in EVALUATE], ("run", "teacher")),
    "compare": (["compare", "run/student", "--prompt", "a dog", "--size", "32", "--out", "new/x.png"], ("run",)),
}  # fmt: skip


def cases(world: Path, draw: random.Random) -> list[Case]:
    return [*_limits(draw), *_read_only(), *_kills(world, draw), *_signals(draw)]


def _file_limit(size: int) -> Callable[[Path], None]:
    """No file may be longer; writing past it is refused as on a full disk (EFBIG)."""

    def limit(_: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def _small_disk(size: int) -> Callable[[Path], None]:
    """What is new lies on a small disk of its own; `run_case` takes it away again."""

    def mount(here: Path) -> None:
        new = here / "new"
        new.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", new], check=True)

    return mount


def _limits(draw: random.Random) -> list[Case]:
    found = []
    for name, (command, needs) in COMMANDS.items():
        for size in draw.sample([0, 100, 1000, 5000, 20_000, 100_000], 2):
            found.append(
                Case("disk: file limit", f"{name} {size}", command, inside=_file_limit(size), needs=needs, names=("new", "run", "cannot", "stopped"))
            )  # fmt: skip
        if os.geteuid() == 0:
            for size in draw.sample([4096, 16_384, 65_536, 262_144, 524_288], 2):
                found.append(
                    Case("disk: full", f"{name} {size}", command, inside=_small_disk(size), needs=needs, names=("new",))
                )  # fmt: skip
    return found


def _read_only_mount(here: Path) -> None:
    """The case's folder, seen through a mount that nothing can be written to."""
    subprocess.run(["mount", "--bind", here, here], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", here], check=True)
    os.chdir(here)


def _read_only() -> list[Case]:
    if os.geteuid() != 0:
        return []
    return [
        Case("disk: read-only", name, command, inside=_read_only_mount, needs=needs, names=("new", "run"))
        for name, (command, needs) in COMMANDS.items()
    ]  # fmt: skip


_OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "open", "fsync", "symlink", "utime")


def _kill_at(number: int) -> Callable[[Path], None]:
    """SIGKILL before the `number`-th operation that changes a file."""

    def patch(here: Path) -> None:
        count = [0]

        def watched(
            call: Callable[..., object], changes: Callable[..., bool]
        ) -> Callable[..., object]:
            def wrapper(*values: object, **named: object) -> object:
                if changes(*values):
                    count[0] += 1
                    if count[0] == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*values, **named)

            return wrapper

        for name in _OPERATIONS:
            changes = _opens_to_write if name == "open" else _always
            setattr(os, name, watched(getattr(os, name), changes))

    return patch


def _always(*_: object) -> bool:
    return True


def _opens_to_write(path: object, flags: int = 0, *_: object) -> bool:
    return bool(flags & (os.O_CREAT | os.O_WRONLY))


def _again(command: list[str], reference: Path) -> Callable[[Path, int], str | None]:
    """The same command once more ends well, leaves nothing behind and gives the same files."""

    def finish(here: Path, _: int) -> str | None:
        from faults import run_case

        inner = here / "again"
        parts = tuple(p.name for p in here.iterdir() if p.is_dir())
        result = run_case(Case("again", "again", command, needs=parts), here, inner)
        whole = (here / "new" / "checksums.json").is_file()
        if whole and result.code == 2 and "is not empty" in result.said:
            return None  # it was killed when all was done
        if result.code or result.faults:
            return f"again: {result.code} {result.faults} {result.said[-300:]}"
        left = [p.name for p in inner.rglob(".*.tmp")]
        return f"left behind: {left[:3]}" if left else None

    return finish


def _kills(world: Path, draw: random.Random) -> list[Case]:
    found = []
    for name, (command, needs) in COMMANDS.items():
        for number in draw.sample(range(1, 25), 3):
            found.append(
                Case("killed", f"{name} at {number}", command, inside=_kill_at(number), needs=needs, killed=True, finish=_again(command, world))
            )  # fmt: skip
    return found


def _signal_after(number: signal.Signals, seconds: float) -> Callable[[Path], None]:
    def start(_: Path) -> None:
        def send() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()

    return start


def _signals(draw: random.Random) -> list[Case]:
    return [
        Case("signal", f"{name} {number.name} {seconds:.2f}", command, inside=_signal_after(number, seconds), needs=needs)
        for name, (command, needs) in COMMANDS.items()
        for number in (signal.SIGTERM, signal.SIGINT)
        for seconds in [draw.uniform(0.02, 1.2)]
    ]  # fmt: skip
