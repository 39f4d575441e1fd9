"""A server under load and under clients that do not behave, against the sampler alone.

python benchmarks/serve.py --out docs/results/serve.json

Everything is on this machine's loopback and bounded in time. The sampler's own rate and the loads
of the server take turns, several rounds of them; the best round counts. A share of the sampler's
rate is the median of shares of what it had just before and just after. CPU seconds a picture say
what the server adds where the machine has other work.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from serve_clients import (
    Client,
    Tally,
    body,
    broken,
    closed_load,
    open_load,
    slow_bodies,
    vanish,
)

KEY = "a-key-of-this-benchmark"
_TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A server in a process of its own."""

    def __init__(self, command: list[str], *, patience: float = 60, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [word.replace("PORT", str(self.port)) for word in command]
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        self.process.terminate()
        raise RuntimeError(f"{shlex.join(command)} did not get ready")

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(text.split("VmRSS:")[1].split()[0])

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def running(command: list[str], *, patience: float = 60, **variables: str) -> Any:
    server = Process(command, patience=patience, **variables)
    try:
        yield server
    finally:
        server.end()


def sampler_rate(model: str, batch: int, size: int, seconds: float) -> dict[str, float]:
    """Pictures a second, and CPU seconds a picture, of the sampler itself in this process."""
    from twostep.evaluation.prompts import PromptSet
    from twostep.inference.sampler import Sampler
    from twostep.method.rollout import seeded_noise

    sampler = Sampler.load(model)
    prompts = list(PromptSet.load("emoji", 64, 1).captions)
    shape, made = sampler.noise_shape(size, size), 0
    for start in range(0, 64, batch):  # every prompt encoded once, as the server's are
        sampler.encoder.encode(prompts[start : start + batch])
    sampler.generate(prompts[:batch], seeded_noise(range(batch), shape))
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        texts = [prompts[(made + i) % 64] for i in range(batch)]
        sampler.generate(texts, seeded_noise(range(made, made + batch), shape))
        made += batch
    return {
        "rate": made / (time.perf_counter() - started),
        "cpu": (time.process_time() - cpu) / made,
    }


def in_own_process(model: str, batch: int, size: int, seconds: float) -> dict[str, float]:
    case = json.dumps([model, batch, size, seconds])
    found = subprocess.run(
        [sys.executable, __file__, "--sampler", case], capture_output=True, text=True, check=True
    )
    rate: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return rate


def percentiles(values: list[float]) -> dict[str, float]:
    """Of seconds, in milliseconds."""
    ranked = sorted(values)
    if not ranked:
        return {}
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        name: 1e3 * ranked[min(len(ranked) - 1, int(share * len(ranked)))]
        for name, share in at.items()
    }


def summary(tally: Tally, seconds: float, cpu: float) -> dict[str, Any]:
    made = len(tally.latencies)
    return {
        "pictures": made,
        "rate": made / seconds,
        "cpu": cpu / max(1, made),
        "latency": percentiles(tally.latencies),
        "preview": percentiles(tally.previews),
        "refusal": percentiles(tally.refusals),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
    }


def closed(server: Process, prompts: list[str], **load: Any) -> dict[str, Any]:
    before = server.cpu()
    tally, seconds = asyncio.run(closed_load(server.port, prompts, **load))
    return summary(tally, seconds, server.cpu() - before)


def opened(server: Process, prompts: list[str], **load: Any) -> dict[str, Any]:
    before = server.cpu()
    tally, seconds = asyncio.run(open_load(server.port, prompts, **load))
    return summary(tally, seconds, server.cpu() - before)


def flood(server: Process, prompts: list[str], *, rate: float, seconds: float) -> dict[str, Any]:
    """Many times what it can do; and the first request after it."""
    memory = server.memory()
    found = opened(server, prompts, rate=rate, seconds=seconds)
    after = Tally()
    asyncio.run(Client(server.port).ask(body(prompts, 0, preview=False), after))
    return found | {
        "asked_rate": rate,
        "memory_before": memory,
        "memory_after": server.memory(),
        "first_after_ms": 1e3 * after.latencies[0],
    }


def soak(server: Process, prompts: list[str], *, seconds: float, parts: int = 4) -> dict[str, Any]:
    """Memory over a longer load with previews, every prompt encoded before."""
    memory, made = [server.memory()], 0
    for _ in range(parts):
        load = {"clients": 8, "seconds": seconds / parts, "preview": True}
        made += closed(server, prompts, **load)["pictures"]
        memory.append(server.memory())
    return {"seconds": seconds, "pictures": made, "memory": memory}


async def misbehaving(server: Process, prompts: list[str], seconds: float) -> dict[str, Any]:
    """One good client beside slow and vanishing ones."""
    good, *_ = await asyncio.gather(
        closed_load(server.port, prompts, clients=1, seconds=seconds, preview=True),
        slow_bodies(server.port, 50, seconds),
        vanish(server.port, prompts, 100),
    )
    return summary(*good, 0.0)


async def faults(server: Process) -> dict[str, Any]:
    """Fuzzed and oversized bodies with the right key, and good ones with wrong keys."""
    source, found = random.Random(0), {}

    async def all_of(count: int, key: str, make: Callable[[], bytes]) -> dict[str, int]:
        tally, client = Tally(), Client(server.port, key)
        for _ in range(count):
            await client.ask(make(), tally)
        client.close()
        return {str(status): count for status, count in sorted(tally.statuses.items())}

    found["fuzzed"] = await all_of(200, KEY, lambda: broken(source))
    found["oversized"] = await all_of(20, KEY, lambda: b'{"prompt": "' + b"x" * 200_000 + b'"}')
    found["wrong_key"] = await all_of(50, KEY[:-1], lambda: b'{"prompt": "a cat"}')
    found["after"] = await all_of(5, KEY, lambda: b'{"prompt": "a cat"}')
    return found


def main(
    model: Annotated[str, typer.Option()] = "zoo:emoji-student",
    peer: Annotated[str, typer.Option(help="a teacher's folder, for diffusers")] = (
        "zoo:emoji-teacher"
    ),
    batch: Annotated[int, typer.Option(min=1)] = 8,
    size: Annotated[int, typer.Option(help="pixels")] = 64,
    clients: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="of each load")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = Path("runs/benchmarks/serve.json"),
    sampler: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Loads a server and writes one JSON file."""
    if sampler:
        print(json.dumps(sampler_rate(*json.loads(sampler))))
        return
    from twostep.evaluation.prompts import PromptSet
    from twostep.models.locate import locate
    from twostep.runtime.files import write_json
    from twostep.runtime.provenance import stamp

    prompts = list(PromptSet.load("emoji", 64, 1).captions)
    ours = [
        *(sys.executable, "-m", "twostep", "serve", "--model", model, "--port", "PORT"),
        *("--size", str(size), "--max-batch", str(batch)),
    ]
    theirs = [
        *(sys.executable, str(Path(__file__).with_name("serve_peer.py"))),
        *(str(locate(peer, ("*",))), str(size), "PORT"),
    ]
    numbers = clients or [1, 8, 32]
    runs: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, found: dict[str, Any]) -> None:
        runs.setdefault(name, []).append(found)
        print(f"{name}: {found['rate']:.1f} pictures/s")

    with running(ours) as server:
        asyncio.run(closed_load(server.port, prompts, clients=8, seconds=3, preview=False))
        for _ in range(rounds):
            keep("sampler 1", in_own_process(model, 1, size, seconds))
            before = in_own_process(model, batch, size, seconds)
            for number in numbers:
                both = {}
                for preview in (False, True):
                    name = f"{number} {'preview' if preview else 'plain'}"
                    load = {"clients": number, "seconds": seconds, "preview": preview}
                    both[name] = closed(server, prompts, **load)
                after = in_own_process(model, batch, size, seconds)
                keep("sampler", after)
                for name, found in both.items():
                    own = (before["rate"] + after["rate"]) / 2
                    keep(name, found | {"of_sampler": found["rate"] / own})
                before = after
        best = {name: max(found, key=lambda each: each["rate"]) for name, found in runs.items()}
        for name, found in runs.items():
            if "of_sampler" in found[0]:
                best[name]["of_sampler"] = median(each["of_sampler"] for each in found)
        for share in (0.5, 0.8):
            name = f"open {share}"
            # What it can do now: the machine may have other work than a moment ago.
            load = {"clients": numbers[-1], "seconds": seconds, "preview": False}
            capacity = closed(server, prompts, **load)["rate"]
            best[name] = opened(server, prompts, rate=share * capacity, seconds=2 * seconds)
            best[name]["asked_rate"] = share * capacity
        soaked = soak(server, prompts, seconds=12 * seconds)
        best["flood"] = flood(server, prompts, rate=20 * capacity, seconds=seconds)
        best["misbehaving"] = asyncio.run(misbehaving(server, prompts, seconds))
    with running(theirs) as server:
        for number in numbers:
            load = {"clients": number, "seconds": seconds, "preview": False}
            best[f"{number} peer"] = closed(server, prompts, **load)
            print(f"peer, {number} clients: {best[f'{number} peer']['rate']:.1f} pictures/s")
    with running(ours, TWOSTEP_API_KEY=KEY) as server:
        found_faults = asyncio.run(faults(server))
        ended = server.end()
    results = {
        "command": shlex.join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
        **stamp(),
        "batch": batch,
        "size": size,
        "clients": numbers,
        "seconds": seconds,
        "rounds": rounds,
        "cases": best,
        "soak": soaked,
        "faults": found_faults | {"exit_code": ended},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(out)


if __name__ == "__main__":
    typer.run(main)
