"""A sample of a stream that does not depend on its order: the records whose hash is lowest (bottom-k; Cohen & Kaplan 2007).

Which records are chosen follows from their keys and the seed alone, so a data set that was shuffled or sharded otherwise
gives the same sample, and a larger limit gives a superset. Memory: one number for each record that is kept; the records wait
on disk. A stream of N gives k (1 + ln(N / k)) records to wait, in expectation.
"""

from __future__ import annotations

import hashlib
import heapq
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

Record = TypeVar("Record")


def mark(text: str, seed: int) -> int:
    """A number below 2^64 that looks drawn by chance, the same on every machine.

    >>> mark("tapir", 0) == mark("tapir", 0), mark("tapir", 0) == mark("tapir", 1)
    (True, False)
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "big"))
    return int.from_bytes(digest.digest(), "big")


class Lowest:
    """The `limit` lowest of the different numbers offered so far.

    >>> lowest = Lowest(2)
    >>> [lowest.offer(number) for number in (5, 9, 5, 7, 8)], 9 in lowest, 7 in lowest
    ([True, True, True, True, False], False, True)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[int] = []  # negated: the largest comes first
        self._kept: set[int] = set()

    def offer(self, number: int) -> bool:
        """Whether it is among the lowest as far as is known."""
        if number in self._kept:
            return True
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, -number)
        elif self._heap and number < -self._heap[0]:
            self._kept.discard(-heapq.heapreplace(self._heap, -number))
        else:
            return False
        self._kept.add(number)
        return True

    def __contains__(self, number: int) -> bool:
        return number in self._kept


def sample(
    records: Iterable[Record],
    limits: Mapping[str, int | None],
    *,
    key: Callable[[Record], tuple[str, str]],
    seed: int,
) -> Iterator[Record]:
    """The records whose marks are lowest in their group, in the order of the stream; all of a key, or none.

    Args:
        limits: most different keys of each group; None takes them all.
        key: the group of a record, and the text that it is chosen by.

    >>> def chosen(letters, limit):
    ...     return set(sample(letters, {"": limit}, key=lambda letter: ("", letter), seed=0))
    >>> few = chosen("abcdefgh", 3)
    >>> len(few), few == chosen("hgfedcba", 3), few < chosen("abcdefgh", 4)
    (3, True, True)
    """
    if set(limits.values()) == {None}:
        yield from records
        return
    lowest = {group: Lowest(limit) for group, limit in limits.items() if limit is not None}
    with tempfile.TemporaryFile() as waiting:
        count = 0
        for record in records:
            group, text = key(record)
            number = mark(text, seed)
            if group not in lowest or lowest[group].offer(number):
                pickle.dump((group, number, record), waiting)
                count += 1
        waiting.seek(0)
        for _ in range(count):
            group, number, record = pickle.load(waiting)  # written above, by this process, to a file without a name
            if group not in lowest or number in lowest[group]:
                yield record
