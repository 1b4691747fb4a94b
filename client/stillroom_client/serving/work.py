"""The work behind calls: a few threads, a bounded number of calls that wait for them, and an end to each.

A call that was cancelled, or whose time is over before a thread is free, is given up and costs nothing more. One that
runs already runs to its end, because a search cannot be stopped half-way; its result is thrown away, and it counts as
pending until then.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stillroom_client.serving.codes import DeadlineError, OverloadedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one server takes on.

    Attributes:
        workers: threads that search. A search holds a core for most of its time, so more than there are cores only wait.
        pending: calls that wait or run, over all clients; with 5 ms a search and 2 workers, the last waits 0.6 s.
        seconds: of a call at most, also when its client sets no deadline or a later one.
        adding_seconds: the same for `Add`, which embeds.
        message_bytes: of one message in either direction; what clients take by default.
        k: hits of `Search`.
        streamed: hits of `SearchStream`.
        query_characters: of a query; the tower reads some 30 words of it, the full-text index all.
        passage_characters: of the text of a passage that is added.
        added: passages of one `Add`.
        added_bytes: of the messages of one `Add`, which are held until it is complete.
    """

    workers: int = 2
    pending: int = 256
    seconds: float = 30.0
    adding_seconds: float = 1_800.0
    message_bytes: int = 4 * 2**20
    k: int = 1_000
    streamed: int = 10_000
    query_characters: int = 10_000
    passage_characters: int = 100_000
    added: int = 20_000
    added_bytes: int = 64 * 2**20


class Caller(Protocol):
    """Whoever called: gRPC's context."""

    def time_remaining(self) -> float | None:
        """Seconds to its deadline; None without one."""


class Work:
    """Threads for reading, and one for what writes or embeds, so that adding never stands in the way of searches."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._reading = ThreadPoolExecutor(limits.workers, "stillroom-search")
        self._writing = ThreadPoolExecutor(1, "stillroom-write")
        self._pending = 0
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Calls that wait or run."""
        return self._pending

    @asynccontextmanager
    async def time_of(self, caller: Caller, limit: float) -> AsyncIterator[float]:
        """The end of a call by `time.monotonic`: its client's deadline, `limit` seconds at most. Cuts off what is inside.

        Raises:
            DeadlineError: it is over.
        """
        remaining = caller.time_remaining()
        seconds = limit if remaining is None else min(remaining, limit)
        try:
            async with asyncio.timeout(seconds):
                yield time.monotonic() + seconds
        except TimeoutError:
            raise DeadlineError(f"not done within {seconds:.3g} s: allow more time, or ask for less") from None

    async def read(self, caller: Caller, task: Callable[[], T]) -> T:
        """What `task` returns, from a thread for searching."""
        async with self.time_of(caller, self.limits.seconds) as end:
            return await self._run(self._reading, task, end)

    async def write(self, caller: Caller, task: Callable[[], T]) -> T:
        """The same from the thread for writing."""
        async with self.time_of(caller, self.limits.seconds) as end:
            return await self.write_before(end, task)

    async def write_before(self, end: float, task: Callable[[], T]) -> T:
        """One of several tasks of a call whose time is counted by the caller."""
        return await self._run(self._writing, task, end)

    async def _run(self, pool: ThreadPoolExecutor, task: Callable[[], T], end: float) -> T:
        with self._lock:
            if self._pending >= self.limits.pending:
                raise OverloadedError(f"{self.limits.pending} calls are waiting already: try again later")
            self._pending += 1

        def timely() -> T:
            if time.monotonic() > end:
                raise DeadlineError("given up: its time was over before its turn came")
            return task()

        try:
            future = pool.submit(timely)
        except BaseException:
            self._done(None)
            raise
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)  # cancelling this cancels what has not begun

    def _done(self, future: Future[T] | None) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """Wait for what runs, drop what waits."""
        for pool in (self._reading, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)
