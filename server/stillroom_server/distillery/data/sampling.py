"""A sample of a stream that does not depend on its order: the records whose hash is lowest (bottom-k; Cohen & Kaplan 2007).

Which records are chosen follows from their keys and the seed alone, so a data set that was shuffled or sharded otherwise
gives the same sample, and a larger limit gives a superset. Memory: some 40 bytes for each record that is kept, while they are
sorted; the records wait on disk. Of a stream of N, k (2 + log2(N / k)) wait at most, in expectation.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

Record = TypeVar("Record")
_SLACK = 1_024
"""Numbers beyond the limit that are held before they are sorted, however small the limit is."""


def mark(text: str, seed: int) -> int:
    """A number below 2^64 that looks drawn by chance, the same on every machine.

    >>> mark("tapir", 0) == mark("tapir", 0), mark("tapir", 0) == mark("tapir", 1)
    (True, False)
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "big"))
    return int.from_bytes(digest.digest(), "big")


class Lowest:
    """The `limit` lowest of the different numbers below 2^64 offered so far, with up to twice as many held, 8 bytes each.

    >>> lowest = Lowest(2)
    >>> [lowest.offer(number) for number in (5, 9, 5, 7, 8)], 9 in lowest, 7 in lowest, lowest.offer(8)
    ([True, True, True, True, True], False, True, False)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = array("Q")
        self._ascending = True
        self._highest = (1 << 64) - 1 if limit else -1

    def offer(self, number: int) -> bool:
        """Whether it is among the lowest as far as is known: never False for one that is."""
        if number > self._highest:
            return False
        self._held.append(number)
        self._ascending = False
        if len(self._held) >= 2 * self._limit + _SLACK:
            self._settle()
        return True

    def __contains__(self, number: int) -> bool:
        self._settle()
        place = bisect_left(self._held, number)
        return place < len(self._held) and self._held[place] == number

    def _settle(self) -> None:
        """Hold the lowest alone, each once, in ascending order."""
        if not self._ascending:
            lowest = np.unique(np.frombuffer(self._held, np.uint64))[: self._limit]
            self._held, self._ascending = array("Q", lowest.tobytes()), True
            if len(lowest) == self._limit:
                self._highest = int(lowest[-1])


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

    def offered() -> Iterator[tuple[str, int, Record]]:
        for record in records:
            group, text = key(record)
            number = mark(text, seed)
            if group not in lowest or lowest[group].offer(number):
                yield group, number, record

    with on_disk(offered()) as again:
        for group, number, record in again():
            if group not in lowest or number in lowest[group]:
                yield record


@contextmanager
def on_disk(records: Iterable[Record]) -> Iterator[Callable[[], Iterator[Record]]]:
    """The records of a stream, to be read as often as asked for, one reading after the other.

    >>> with on_disk(iter("ab")) as again:
    ...     [*again(), *again()]
    ['a', 'b', 'a', 'b']
    """
    with tempfile.TemporaryFile() as file:
        count = 0
        for record in records:
            pickle.dump(record, file)
            count += 1

        def again() -> Iterator[Record]:
            file.seek(0)
            for _ in range(count):
                yield pickle.load(file)  # written above, by this process, to a file without a name

        yield again
