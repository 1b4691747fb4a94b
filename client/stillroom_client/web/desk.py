"""The desk: one search at a time, off the event loop, and of one tab the latest only.

Who types sends a search with every letter. Those that wait while another runs are worth nothing once a later one of the
same tab is here: they are dropped, not answered one after the other. What runs is finished; it takes milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
_TABS = 64  # that are remembered


class SupersededError(Exception):
    """A later search of the same tab has come."""


class Desk:
    """Runs what reads the device in one thread of its own, and what only computes (`aside`) in another."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stillroom-search")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="stillroom-aside")
        self._latest: OrderedDict[str, tuple[int, Future[Any] | None]] = OrderedDict()

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, in its turn."""
        return await asyncio.wrap_future(self._worker.submit(work))

    async def aside(self, work: Callable[[], Result]) -> Result:
        """The same beside the searches, for what may take seconds and does not search."""
        return await asyncio.wrap_future(self._aside.submit(work))

    async def latest(self, tab: str, number: int, work: Callable[[], Result]) -> Result:
        """The result of `work`, unless a higher number of the same tab comes before its turn: then `SupersededError`."""
        newest, waiting = self._latest.pop(tab, (-1, None))
        if number < newest:
            self._latest[tab] = (newest, waiting)
            raise SupersededError
        if waiting is not None:
            waiting.cancel()  # does nothing to one that runs
        future = self._worker.submit(work)
        self._latest[tab] = (number, future)
        while len(self._latest) > _TABS:
            self._latest.popitem(last=False)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled():
                raise SupersededError from None
            raise

    def background(self, work: Callable[[], None]) -> None:
        """Begin `work` before anything that comes later; nobody waits for it."""
        self._worker.submit(work)

    def close(self) -> None:
        """Wait for what runs, drop what waits."""
        for pool in (self._worker, self._aside):
            pool.shutdown(cancel_futures=True)
