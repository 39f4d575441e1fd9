"""Clients of a server, as light as they can be: they share its two cores."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/images/generations"


@dataclass
class Tally:
    """What clients saw; seconds."""

    latencies: list[float] = field(default_factory=list)
    previews: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


class Client:
    """One connection, kept alive."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port, self.key = port, key
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    def head(self, length: int) -> bytes:
        lines = [
            f"POST {PATH} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
            f"Content-Length: {length}",
        ]  # fmt: skip
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def ask(self, body: bytes, tally: Tally) -> None:
        """One request; a kept connection that was closed meanwhile is opened anew."""
        started = time.perf_counter()
        for attempt in range(2):
            fresh = self.writer is None
            try:
                if self.writer is None:
                    self.reader, self.writer = await asyncio.open_connection(
                        "127.0.0.1", self.port, limit=2**22
                    )
                self.writer.write(self.head(len(body)) + body)
                await self._answer(started, tally)
                return
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                if fresh or attempt:
                    tally.statuses[0] += 1
                    return

    async def _answer(self, started: float, tally: Tally) -> None:
        assert self.reader is not None
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        if "transfer-encoding: chunked" in head:
            while size := int(await self.reader.readline(), 16):
                part = await self.reader.readexactly(size + 2)
                if b"event: image_generation.partial" in part:
                    tally.previews.append(time.perf_counter() - started)
            await self.reader.readline()
        else:
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            await self.reader.readexactly(length)
        if "connection: close" in head:
            self.close()
        seconds = time.perf_counter() - started
        tally.statuses[status] += 1
        (tally.latencies if status == 200 else tally.refusals).append(seconds)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def body(prompts: Sequence[str], number: int, *, preview: bool) -> bytes:
    """A request for one picture."""
    value: dict[str, Any] = {"prompt": prompts[number % len(prompts)], "seed": number}
    if preview:
        value |= {"stream": True, "partial_images": 1}
    return json.dumps(value).encode()


async def closed_load(
    port: int, prompts: Sequence[str], *, clients: int, seconds: float, preview: bool
) -> tuple[Tally, float]:
    """Clients that ask again as soon as they are answered; and how long it took."""
    tally, numbers = Tally(), iter(range(10**9))
    started = time.perf_counter()

    async def one() -> None:
        client = Client(port)
        while time.perf_counter() - started < seconds:
            await client.ask(body(prompts, next(numbers), preview=preview), tally)
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return tally, time.perf_counter() - started


async def open_load(
    port: int, prompts: Sequence[str], *, rate: float, seconds: float, seed: int = 0
) -> tuple[Tally, float]:
    """Requests that come by chance, `rate` a second, whether the others are answered or not."""
    tally, source, tasks = Tally(), random.Random(seed), []
    idle: list[Client] = []
    started, due, number = time.perf_counter(), 0.0, 0

    async def one(data: bytes) -> None:
        client = idle.pop() if idle else Client(port)
        await client.ask(data, tally)
        idle.append(client)

    while (due := due + source.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - started)))
        tasks.append(asyncio.create_task(one(body(prompts, number, preview=False))))
        number += 1
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return tally, time.perf_counter() - started


async def slow_bodies(port: int, count: int, seconds: float) -> None:
    """Connections that send a byte of their body now and then."""

    async def one() -> None:
        client = Client(port)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(client.head(500))
            for _ in range(int(seconds / 0.2)):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.2)
        except OSError:
            pass
        writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


async def vanish(port: int, prompts: Sequence[str], count: int) -> None:
    """Clients that ask for a stream and are gone at once."""
    for number in range(count):
        client, data = Client(port), body(prompts, number, preview=True)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(client.head(len(data)) + data)
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.01)


def broken(source: random.Random) -> bytes:
    """A request's body with something wrong in it, more often than not."""
    odd = [None, -1, 2**63, "", "\x00", "x" * 300, [], {}, True, 0.5]
    value: dict[str, Any] = {"prompt": "a cat", "n": 1, "seed": 1, "size": "64x64"}
    for _ in range(source.randrange(1, 4)):
        value[source.choice([*value, "extra", "stream", "output_format"])] = source.choice(odd)
    data = bytearray(json.dumps(value).encode())
    for _ in range(source.choice([0, 0, 1, 3])):
        data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data)
