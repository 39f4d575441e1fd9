"""One process, two whole replicas, a line of two stages, and the peers, side by side.

python benchmarks/serve_cluster.py --out docs/results/serve-cluster.json

All of them run at once, each on a Ray of its own where it has one, and are loaded in turn, several
rounds of it: a figure of one is to be read against the others of the same run. In the end a replica
is killed under load. Needs 12 GiB: three of them start a Ray of ten processes each.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from serve import Process, closed, running


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, by Linux' own list."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, rest = [], [pid]
    while rest:
        below = parents.get(rest.pop(), [])
        found += below
        rest += below
    return found


def kill_replica(server: Process, name: str) -> None:
    """One process of the deployment `name`, as a machine that fails would end it."""
    for pid in descendants(server.process.pid):
        if f"ServeReplica:twostep:{name}" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            return
    raise RuntimeError(f"no replica of {name}")


def killed(server: Process, prompts: list[str], seconds: float) -> dict[str, Any]:
    """A load during which a replica is killed."""
    timer = threading.Timer(seconds / 3, kill_replica, (server, "models"))
    timer.start()
    found = closed(server, prompts, clients=8, seconds=seconds, preview=False)
    timer.join()
    return found


def main(
    model: Annotated[str, typer.Option()] = "zoo:emoji-student",
    peer: Annotated[str, typer.Option(help="a teacher's folder, for diffusers")] = (
        "zoo:emoji-teacher"
    ),
    size: Annotated[int, typer.Option(help="pixels")] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    seconds: Annotated[float, typer.Option(min=0.5, help="of each load")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    patience: Annotated[float, typer.Option(help="seconds for a server to get ready")] = 240.0,
    out: Annotated[Path, typer.Option()] = Path("runs/benchmarks/serve-cluster.json"),
) -> None:
    """Loads all servers in turn and writes one JSON file."""
    from twostep.evaluation.prompts import PromptSet
    from twostep.models.locate import locate
    from twostep.runtime.files import write_json
    from twostep.runtime.provenance import stamp

    prompts = list(PromptSet.load("emoji", 64, 1).captions)
    teacher = str(locate(peer, ("*",)))
    ours = [
        *(sys.executable, "-m", "twostep", "serve", "--model", model, "--port", "PORT"),
        *("--size", str(size), "--max-batch", str(batch), "--queue", "256"),
    ]
    on_ray = [*ours, "--ray", "--share", "0.5"]
    here = Path(__file__)
    commands = {
        "one process": ours,
        "two whole replicas": [*on_ray, "--replicas", "2"],
        "two stages": [*on_ray, "--two-stage"],
        "peer": [sys.executable, str(here.with_name("serve_peer.py")), teacher, str(size), "PORT"],
        "peer on Ray": [
            *(sys.executable, str(here.with_name("serve_cluster_peer.py"))),
            *(teacher, str(size), "PORT", "2", str(batch)),
        ],
    }
    loads = [(1, False), (8, False), (8, True), (128, False)]
    runs: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            started = time.monotonic()
            servers[name] = stack.enter_context(running(command, patience=patience))
            print(f"{name}: ready in {time.monotonic() - started:.0f} s", flush=True)
        for server in servers.values():
            closed(server, prompts, clients=8, seconds=seconds, preview=False)  # prompts encoded
        for _ in range(rounds):
            for clients, preview in loads:
                for name, server in servers.items():
                    if preview and "peer" in name:
                        continue
                    found = closed(
                        server, prompts, clients=clients, seconds=seconds, preview=preview
                    )
                    case = f"{name}, {clients}{' previews' if preview else ''}"
                    runs.setdefault(case, []).append(found)
                    print(f"{case}: {found['rate']:.1f} pictures/s", flush=True)
        after = killed(servers["two whole replicas"], prompts, 4 * seconds)
        print(f"a killed replica: {after['statuses']}", flush=True)
    cases = {}
    for case, found in runs.items():
        middle = sorted(found, key=lambda each: each["rate"])[len(found) // 2]
        base = case.replace(case.partition(",")[0], "one process")
        pairs = zip(found, runs[base], strict=True)
        cases[case] = middle | {"of_one": median(a["rate"] / b["rate"] for a, b in pairs)}
    results = {
        "command": shlex.join(["python", "benchmarks/serve_cluster.py", *sys.argv[1:]]),
        **stamp(),
        "batch": batch,
        "size": size,
        "seconds": seconds,
        "rounds": rounds,
        "cases": cases,
        "killed": after,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(out)


if __name__ == "__main__":
    typer.run(main)
