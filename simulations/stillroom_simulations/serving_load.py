"""What a served device bears: many connected clients, first as fast as it answers, then at half of that.

1. Closed loop: every client sends its next search when it has the answer to the last. What comes through is the capacity.
2. Open loop: searches are due at the times of a Poisson process at half the capacity, whether earlier ones were answered or
   not. A latency counts from the time a search was due, not from when it was sent, so that a stall of the server, or of the
   generator, is in every latency it delayed (no coordinated omission: Tene, "How NOT to measure latency", 2013).

The server is `stillroom serve` in a process of its own, on its Unix socket; the generator is this process, one event loop with
a connection for each client. They share the machine's cores: how much each took is among the figures, and so is how late
the generator sent, which bounds what it may have added.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from stillroom_client.serving import retrieval_pb2 as pb
from stillroom_client.serving.places import read_address
from stillroom_client.serving.retrieval_pb2_grpc import RetrievalStub
from stillroom_shared.errors import DataError, StillroomError

K = 10
CLOSED_SECONDS = 10.0
_WARM_SECONDS = 3.0
_DEADLINE = 30.0
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One loop: searches a second asked for and answered, and their latencies in milliseconds.

    `errors` counts failed searches by status code. `server_cores` and `generator_cores` are processor seconds per second.
    """

    seconds: float
    asked_per_second: float
    answered_per_second: float
    searches: int
    errors: dict[str, int]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    worst_ms: float
    late_p99_ms: float
    server_cores: float
    generator_cores: float


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """What `serving_load` measured. Memory is what the server holds resident, in MB of 10^6 bytes: `before` and `after` the
    open loop, and the most in between."""

    clients: int
    cores: int
    closed: Phase
    open: Phase
    memory_before: float
    memory_after: float
    memory_peak: float

    @property
    def tail(self) -> float:
        """p99 / p50 of the open loop."""
        return self.open.p99_ms / self.open.p50_ms

    @property
    def growth(self) -> float:
        """Memory after / before the open loop."""
        return self.memory_after / self.memory_before


def serving_load(
    home: Path,
    queries: Sequence[str],
    seconds: float = 60.0,
    clients: int = 64,
    seed: int = 0,
    *,
    workers: int = 2,
    closed_seconds: float = CLOSED_SECONDS,
) -> ServingFigures:
    """Serve a home and load it.

    Args:
        queries: drawn from in random order; searched by both indexes, 10 results each.
        seconds: of the open loop.
        workers: of the server.

    Raises:
        DataError: there is no query.
        ServiceError: the home is served already.
    """
    if not queries:
        raise DataError("there are no queries to load the server with: give at least one")
    with _served(home, workers) as process:
        return asyncio.run(_measure(home, process.pid, queries, seconds, clients, random.Random(seed), closed_seconds))


async def _measure(
    home: Path,
    pid: int,
    queries: Sequence[str],
    seconds: float,
    clients: int,
    rng: random.Random,
    closed_seconds: float,
) -> ServingFigures:
    target = read_address(home).target
    # Without the last option all channels of a process share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target, options) for _ in range(clients)]
    try:
        searches = [RetrievalStub(channel).Search for channel in channels]  # type: ignore[no-untyped-call]
        await _closed(searches, queries, _WARM_SECONDS, rng, pid)
        closed = await _closed(searches, queries, closed_seconds, rng, pid)
        before = resident(pid)
        sampled = [before]
        watching = asyncio.create_task(_watch(pid, sampled))
        opened = await _open(searches, queries, seconds, closed.answered_per_second / 2, rng, pid)
        watching.cancel()
        after = resident(pid)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    cores = len(os.sched_getaffinity(0))
    return ServingFigures(clients, cores, closed, opened, before, after, max(*sampled, after))


async def _closed(
    searches: Sequence[Any], queries: Sequence[str], seconds: float, rng: random.Random, pid: int
) -> Phase:
    record = _Record(pid)
    end = time.perf_counter() + seconds

    async def client(search: Any) -> None:
        while (now := time.perf_counter()) < end:
            await record.ask(search, rng.choice(queries), now)

    await asyncio.gather(*(client(search) for search in searches))
    return record.phase(asked=None)


async def _open(
    searches: Sequence[Any], queries: Sequence[str], seconds: float, rate: float, rng: random.Random, pid: int
) -> Phase:
    record = _Record(pid)
    waiting: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    for due in arrivals(rate, seconds, rng):
        while (early := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        ask: Coroutine[Any, Any, None] = record.ask(rng.choice(searches), rng.choice(queries), start + due)
        task = asyncio.create_task(ask)
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)
    return record.phase(asked=rate)


def arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """The times of a Poisson process of `rate` a second, ascending, below `seconds`.

    >>> times = list(arrivals(100, 50, random.Random(0)))
    >>> len(times), times == sorted(times), times[-1] < 50
    (4939, True, True)
    """
    due = rng.expovariate(rate)
    while due < seconds:
        yield due
        due += rng.expovariate(rate)


class _Record:
    """Latencies and errors of one loop."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._latencies: list[float] = []
        self._late: list[float] = []
        self._errors: Counter[str] = Counter()
        self._start = time.perf_counter()
        self._cpu = processor_seconds(pid), time.process_time()

    async def ask(self, search: Any, query: str, due: float) -> None:
        """One search that was due at a time of `perf_counter`."""
        self._late.append(time.perf_counter() - due)
        try:
            await search(pb.SearchRequest(query=query, k=K), timeout=_DEADLINE)
        except grpc.aio.AioRpcError as error:
            self._errors[error.code().name] += 1
        self._latencies.append(time.perf_counter() - due)

    def phase(self, asked: float | None) -> Phase:
        """What was recorded. `asked`: a second, None for as much as was answered."""
        seconds = time.perf_counter() - self._start
        answered = (len(self._latencies) - self._errors.total()) / seconds
        p50, p90, p99, worst = np.percentile(self._latencies, [50, 90, 99, 100]) * 1e3
        return Phase(
            seconds=seconds,
            asked_per_second=answered if asked is None else asked,
            answered_per_second=answered,
            searches=len(self._latencies),
            errors=dict(self._errors),
            p50_ms=float(p50),
            p90_ms=float(p90),
            p99_ms=float(p99),
            worst_ms=float(worst),
            late_p99_ms=float(np.percentile(self._late, 99) * 1e3),
            server_cores=(processor_seconds(self._pid) - self._cpu[0]) / seconds,
            generator_cores=(time.process_time() - self._cpu[1]) / seconds,
        )


async def _watch(pid: int, sampled: list[float]) -> None:
    while True:
        await asyncio.sleep(1)
        sampled.append(resident(pid))


def resident(pid: int) -> float:
    """Resident memory of a process, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6


def processor_seconds(pid: int) -> float:
    """Processor time that a process took so far, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _served(home: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    """`stillroom serve`, from when it answers."""
    code = "from stillroom_shared.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--home", str(home), "--workers", str(workers), "--no-cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if not process.stdout.readline():
                raise StillroomError(f"the server did not start: {process.stderr.read().strip()}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
