"""What a model said of texts, kept on disk by content: vectors, matrices of token vectors, scores of candidates.

The key of a shard is a hash of who computed it and of its items, so a stale value cannot be found. Shards appear whole; an
interrupted run loses one.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_shared.errors import DataError

Array = NDArray[np.float32]


class Kept:
    """Arrays in a folder; `folder=None` keeps nothing.

    >>> import tempfile
    >>> calls = []
    >>> def lengths(texts):
    ...     calls.append(len(texts))
    ...     return [np.full(len(text), 1.0, np.float32) for text in texts]
    >>> with tempfile.TemporaryDirectory() as name:
    ...     for _ in range(2):
    ...         found = Kept(Path(name)).arrays("somebody", ["tapir", "", "zoo"], lengths, shard=2)
    >>> [len(array) for array in found], calls
    ([5, 0, 3], [2, 1])
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def arrays(
        self,
        identity: str,
        items: Sequence[str],
        compute: Callable[[Sequence[str]], Sequence[Array]],
        *,
        shard: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Array]:
        """One array for each item, computed in shards or read back; they differ in their first dimension at most.

        Args:
            identity: all that the arrays depend on beside the items.
            items: the texts, or other keys that `compute` understands.
            shard: items that are computed, and lost when interrupted, together.
        """
        found: list[Array] = []
        for start in range(0, len(items), shard):
            part = items[start : start + shard]
            found += self._shard(identity, part, compute)
            progress(start + len(part), len(items))
        return found

    def _shard(
        self, identity: str, items: Sequence[str], compute: Callable[[Sequence[str]], Sequence[Array]]
    ) -> list[Array]:
        if self._folder is None:
            return _finite(identity, items, compute(items))
        digest = hashlib.sha256(identity.encode())
        for item in items:
            digest.update(hashlib.sha256(item.encode()).digest())
        path = self._folder / f"{digest.hexdigest()[:40]}.npz"
        if (known := _read(path)) is not None and len(known) == len(items):
            return known
        arrays = _finite(identity, items, compute(items))
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, flat=np.concatenate(arrays), lengths=np.array([len(array) for array in arrays]))
        partial.replace(path)
        return arrays


def _finite(identity: str, items: Sequence[str], arrays: Sequence[Array]) -> list[Array]:
    for item, array in zip(items, arrays, strict=True):
        if not np.isfinite(array).all():
            raise DataError(f"a model gives a value that is not finite for {item[:60]!r}: it cannot be ranked by")
    return [np.asarray(array, np.float32) for array in arrays]


def _read(path: Path) -> list[Array] | None:
    """The arrays of a file; None when it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return np.split(stored["flat"], np.cumsum(stored["lengths"])[:-1])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # EOFError: of a file without a byte
        return None
