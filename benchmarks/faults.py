"""Wrong settings, damaged files, full disks and kills, a few hundred commands: how does each end?

python benchmarks/faults.py --out runs/faults                     # all of them
python benchmarks/faults.py --only damage --limit 50 --seed 1     # other cases of one kind

Each command runs in a child of one warm process, on copies of a tiny teacher, its cache, a run and
a student, so that a case takes a second. What must not be: a traceback, an ending that is none of
0, 1, 2, 3, 130 and 143, a message that is long or names nothing, no end at all, and success over
something that is broken (silent).
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer

ENDINGS = {0, 1, 2, 3, 130, 143}
# Control characters reach no terminal; nobody reads more than a page.
_MOST_OUTPUT = 6000


@dataclass(frozen=True)
class Case:
    """One command, and what is wrong around it.

    Attributes:
        kind: of the fault, for the table.
        command: arguments of `twostep`; `{here}` stands for the case's own folder.
        damage: prepares the case's folder, a copy of the world.
        inside: runs in the child before the command: limits, patches.
        refused: success would be silent use of something broken.
        names: one of these must be in the message of a refusal.
        finish: what must hold after the command; a sentence where it does not.
        stdin: bytes.
    """

    kind: str
    name: str
    command: list[str]
    damage: Callable[[Path], object] = lambda _: None
    inside: Callable[[Path], object] = lambda _: None
    refused: bool = False
    names: tuple[str, ...] = ()
    finish: Callable[[Path, int], str | None] = lambda _, __: None
    stdin: bytes = b""
    killed: bool = False
    seconds: float = 240.0
    needs: tuple[str, ...] = ()


@dataclass
class Result:
    """How a case ended; `faults` is empty where all is well."""

    kind: str
    name: str
    code: int
    seconds: float
    faults: list[str]
    said: str = ""
    command: list[str] = field(default_factory=list)


def run_case(case: Case, world: Path, here: Path) -> Result:
    """Runs a command in a child, in a copy of what it needs of the world."""
    for mounted in (here, here / "new"):
        while mounted.is_mount():
            subprocess.run(["umount", "-l", mounted], check=True)
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    for part in case.needs:
        shutil.copytree(world / part, here / part, symlinks=True)
    case.damage(here)
    arguments = [a.replace("{here}", str(here)) for a in case.command]
    pipes = [os.pipe(), os.pipe()]
    (here / ".in").write_bytes(case.stdin)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(case, here, arguments, [write for _, write in pipes])
    said = [bytearray(), bytearray()]
    readers = [
        Thread(target=_drain, args=(*pair, into)) for pair, into in zip(pipes, said, strict=True)
    ]
    for reader in readers:
        reader.start()
    code: int | None = None
    while code is None and time.monotonic() - started < case.seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    faults = []
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code, faults = -9, [f"no end in {case.seconds:g} s"]
    spent = time.monotonic() - started
    for reader in readers:
        reader.join(5)  # what the command left running may hold the pipe
    out, errors = (bytes(stream).decode(errors="replace") for stream in said)
    if not faults:
        faults = judge(case, code, out, errors)
    if not faults and (sentence := case.finish(here, code)):
        faults = [sentence]
    shown = errors[-1500:] if faults else errors[-200:]
    return Result(case.kind, case.name, code, spent, faults, shown, arguments)


def _drain(read: int, write: int, into: bytearray) -> None:
    os.close(write)
    while part := os.read(read, 1 << 16):
        into += part
    os.close(read)


def judge(case: Case, code: int, out: str, errors: str) -> list[str]:
    """What is wrong with how a command ended."""
    if case.killed:
        return [] if code in (*ENDINGS, -9) else [f"ending {code}"]
    faults = []
    if "Traceback (most recent call last)" in errors:
        faults.append("traceback")
    if code not in ENDINGS:
        faults.append(f"ending {code}")
    if len(errors) > _MOST_OUTPUT and code:
        faults.append(f"{len(errors)} characters on stderr")
    if any(not c.isprintable() and c not in "\n\r\t" for c in out + errors):
        faults.append("control characters")
    if code == 0 and case.refused:
        faults.append("silent")
    if code in (1, 2) and not faults:
        last = errors.strip()
        if not last:
            faults.append("no message")
        elif case.names and not any(name in last for name in case.names):
            faults.append("unnamed")
    return faults


def _become(case: Case, here: Path, arguments: list[str], streams: list[int]) -> None:
    """The child: never returns."""
    try:
        os.setsid()
        os.chdir(here)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        os.dup2(os.open(here / ".in", os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        case.inside(here)
        sys.argv = ["twostep", *arguments]
        from twostep.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(
    out: Annotated[
        Path, typer.Option(help="folder for the world, the cases and faults.json")
    ] = Path("runs/faults"),
    only: Annotated[str | None, typer.Option(help="kinds that begin with this")] = None,
    limit: Annotated[int | None, typer.Option(help="so many cases of each kind")] = None,
    seed: Annotated[int, typer.Option(help="which of the random cases")] = 0,
) -> None:
    """Run the cases and write what each did."""
    import faults_damage
    import faults_machine
    import faults_settings
    import faults_world

    from twostep.runtime.provenance import stamp

    out = out.absolute()
    world = faults_world.make(out / "world")
    rooms: tuple[Any, ...] = (faults_settings, faults_damage, faults_machine)
    cases = [case for room in rooms for case in room.cases(world, random.Random(seed))]
    cases = [case for case in cases if only is None or case.kind.startswith(only)]
    if limit is not None:
        by_kind: dict[str, list[Case]] = {}
        for case in cases:
            by_kind.setdefault(case.kind, []).append(case)
        draw = random.Random(seed)
        cases = [c for some in by_kind.values() for c in draw.sample(some, min(limit, len(some)))]
    results: list[Result] = []
    for case in cases:
        result = run_case(case, world, out / "case")
        results.append(result)
        if result.faults:
            print(f"{case.kind}: {case.name}: {', '.join(result.faults)}", flush=True)
            print("    " + " ".join(result.command), flush=True)
            print("    " + "\n    ".join(result.said.strip().splitlines()[-6:]), flush=True)
    summary = _summary(results)
    record = {"command": "python benchmarks/faults.py " + " ".join(sys.argv[1:]), **stamp()}
    record |= {"seed": seed, "summary": summary}
    record["faulty"] = [vars(r) for r in results if r.faults]
    (out / "faults.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def _summary(results: list[Result]) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(r.kind for r in results):
        some = [r for r in results if r.kind == kind]
        codes = Counter(r.code for r in some)
        kinds[kind] = {
            "cases": len(some),
            "faulty": sum(bool(r.faults) for r in some),
            "endings": {str(code): codes[code] for code in sorted(codes)},
        }
    faulty = sum(bool(r.faults) for r in results)
    return {
        "cases": len(results),
        "faulty": faulty,
        "seconds": round(sum(r.seconds for r in results)),
        "kinds": kinds,
    }


if __name__ == "__main__":
    sys.modules["faults"] = sys.modules["__main__"]
    typer.run(main)
