"""Values by content hash, on disk: what the caches of scores and vectors are made of.

A store is a folder of runs, Arrow IPC files with one record batch each, sorted by key, which never change:

    FOLDER/RUN.arrow    high: uint64; low: uint64 (the two halves of a 128-bit key); value: fixed_size_list<dtype>[width]

`put` writes a run; when `FANOUT` runs of like size are there, they become one (a log-structured merge tree, O'Neil et al.
1996), so that n values lie in at most (FANOUT - 1) log(n) runs and each is copied log(n) times. Lookups are binary searches
in memory-mapped columns. Keys are hashes, so equal ranges of them hold like numbers, and merging goes range by range.
Anonymous memory therefore does not grow with the store; it is that of the keys in a call and of a few `_MERGED_AT_ONCE`.

Guarantees: a run appears whole, by rename, after it was synced; a process that is killed loses only what it has not put. Each
run carries a CRC-32 of its columns, compared when it is opened: a torn or altered one is removed, so that its values are absent
and computed again. Writers hold a lock on the folder; readers need none, whatever other processes write and merge.

| case | what happens |
|---|---|
| a key put twice, by one process or two | the value of the first stays |
| a key of another half | told apart: both halves are compared |
| a run that another process merges while it is being opened | the folder is listed again |
| a store opened with another width, type or label than it was made with | `DataError` |
| no keys | empty arrays |
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom_shared.errors import DataError
from stillroom_shared.files import exclusive, sync

Keys = NDArray[np.uint64]
FANOUT = 8
_MERGED_AT_ONCE = 1 << 23
"""Bytes of values that are in memory when runs are merged."""
_CHECKED_AT_ONCE = 1 << 24
_log = logging.getLogger(__name__)


def text_digest(text: str) -> bytes:
    """128 bits of a text, also of one that has half a surrogate pair."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def as_keys(digests: Sequence[bytes]) -> Keys:
    """128-bit digests as keys, (n, 2)."""
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class _Run:
    """One opened file; its columns are memory-mapped."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    values: NDArray[Any]

    def find(self, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """(is it here, where) of each key, which come sorted by their high halves."""
        at = np.searchsorted(self.high, keys[:, 0])
        last = len(self.high) - 1
        while True:
            seen = np.minimum(at, last)
            same = (at <= last) & (self.high[seen] == keys[:, 0])
            here = same & (self.low[seen] == keys[:, 1])
            if not (same & ~here).any():
                return here, seen
            at = at + (same & ~here)  # another key with the same high half: its neighbour may be the one


class ContentStore:
    """128-bit keys to rows of numbers.

    >>> import tempfile
    >>> store = ContentStore(Path(tempfile.mkdtemp()), width=2, dtype="float16")
    >>> tapir, zebra, yak = (text_digest(name) for name in ("tapir", "zebra", "yak"))
    >>> store.put(as_keys([tapir, zebra]), np.array([[0.5, 1], [2, 3]]))
    >>> found, values = store.get(as_keys([zebra, yak]))
    >>> found.tolist(), values.tolist()
    ([True, False], [[2.0, 3.0], [0.0, 0.0]])

    Attributes:
        damaged: runs that were found torn or altered since it was opened, and removed.
    """

    def __init__(self, folder: Path, *, width: int, dtype: str = "float32", label: str = "") -> None:
        self.folder = folder
        self.damaged = 0
        self._width = width
        self._dtype = np.dtype(dtype)
        self._label = f"{label} {width} {self._dtype}".encode()
        self._runs: dict[str, _Run] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Stored rows."""
        return sum(len(run.high) for run in self._opened().values())

    def get(self, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """(is it there, its value or zeros) of each key, (n,) and (n, width)."""
        found = np.zeros(len(keys), np.bool_)
        values = np.zeros((len(keys), self._width), self._dtype)
        order = np.argsort(keys[:, 0], kind="stable")  # neighbours share pages of the mapped columns
        for run in self._opened().values():
            open_keys = order[~found[order]]
            here, rows = run.find(keys[open_keys])
            values[open_keys[here]] = run.values[rows[here]]
            found[open_keys[here]] = True
        return found, values

    def all(self, keys: Keys) -> NDArray[Any]:
        """The value of each key, (n, width). Raises `DataError` where one has gone since it was put."""
        found, values = self.get(keys)
        if missing := int((~found).sum()):
            raise DataError(
                f"{missing:,} of {len(keys):,} values are no longer in {self.folder}: it was emptied or damaged while it was "
                "used; run it again, which computes them anew"
            )
        return values

    def put(self, keys: Keys, values: NDArray[Any]) -> None:
        """Keep values, (n, width); they are durable on return."""
        with self._writing():
            new = np.flatnonzero(~self.get(keys)[0])  # what another process has put meanwhile stays
            new = new[distinct(keys[new])]
            if len(new):
                self._write((keys[new, 0], keys[new, 1], np.ascontiguousarray(values[new], self._dtype)))
            while full := self._full_tier():
                self._merge(full)

    def _opened(self) -> dict[str, _Run]:
        """All runs, in order of their names."""
        while True:
            names = sorted(path.name for path in self.folder.glob("*.arrow"))
            try:
                self._runs = {name: run for name in names if (run := self._runs.get(name) or self._open(name))}
                return self._runs
            except FileNotFoundError:  # merged by another process since it was listed
                continue

    def _open(self, name: str) -> _Run | None:
        path = self.folder / name
        try:
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                facts = reader.schema.metadata or {}
                if (label := facts.get(b"label")) is not None and label != self._label:
                    raise DataError(
                        f"{path} holds {label.decode()!r}, not {self._label.decode()!r}: name another folder"
                    )
                batch = reader.get_batch(0)
            columns = _arrays(batch, self._width, self._dtype)
            if int(facts[b"crc32"], 16) == _checksum(columns):
                return _Run(*columns)
        except FileNotFoundError:
            raise
        except MemoryError as error:
            raise DataError(f"{path} cannot be mapped: {error}: give the process more memory") from error
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's word, on this process and not on the file
                raise DataError(f"{path} cannot be read: {error}: mend that, and run it again") from error
            _log.debug("%s: %s", path, error)
        _log.warning("%s is torn or was altered: it is removed, and what it held is computed again", path)
        self.damaged += 1
        path.unlink(missing_ok=True)
        return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone in the folder; whatever a process left that died in here is cleared away."""
        with exclusive(self.folder):
            for left in self.folder.glob("*.partial"):
                left.unlink()
            yield

    def _write(self, columns: Sequence[NDArray[Any]]) -> None:
        schema = _schema(self._width, self._dtype, {"label": self._label, "crc32": f"{_checksum(columns):08x}"})
        name = f"{secrets.token_hex(8)}.arrow"
        partial = self.folder / f"{name}.partial"
        arrays = [*map(_wrapped, columns[:2]), pa.FixedSizeListArray.from_arrays(_wrapped(columns[2]), self._width)]
        with pa.ipc.new_file(str(partial), schema) as file:
            file.write_batch(pa.record_batch(arrays, schema=schema))
        sync(partial)
        partial.rename(self.folder / name)
        sync(self.folder)

    def _full_tier(self) -> list[str]:
        """`FANOUT` or more runs of like size, or none."""
        tiers: dict[int, list[str]] = {}
        for name, run in self._opened().items():
            tiers.setdefault(int(np.log2(len(run.high)) / np.log2(FANOUT)), []).append(name)
        return next((names for _, names in sorted(tiers.items()) if len(names) >= FANOUT), [])

    def _merge(self, names: Sequence[str]) -> None:
        runs = [self._runs[name] for name in names]
        total = sum(len(run.high) for run in runs)
        shapes: Mapping[str, tuple[Any, tuple[int, ...]]] = {
            "high": (np.uint64, (total,)), "low": (np.uint64, (total,)), "value": (self._dtype, (total, self._width))
        }  # fmt: skip
        scratch = [
            np.memmap(self.folder / f"{column}.partial", dtype, "w+", shape=shape)
            for column, (dtype, shape) in shapes.items()
        ]
        written = 0
        for part in _ranges(runs, max(1, _MERGED_AT_ONCE // (16 + self._width * self._dtype.itemsize))):
            for column, new in zip(scratch, part, strict=True):
                column[written : written + len(new)] = new
            written += len(part[0])
        self._write([column[:written] for column in scratch])
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            del self._runs[name]
        for name in shapes:
            (self.folder / f"{name}.partial").unlink()


def _ranges(runs: Sequence[_Run], rows: int) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """(high, low, values) of all runs in order of keys, each key once, some `rows` at a time."""
    pieces = max(1, -(-sum(len(run.high) for run in runs) // rows))
    edges = [np.uint64(piece * 2**64 // pieces) for piece in range(1, pieces)]
    bounds = [[0, *np.searchsorted(run.high, np.array(edges, np.uint64)), len(run.high)] for run in runs]
    for piece in range(pieces):
        cuts = [slice(bound[piece], bound[piece + 1]) for bound in bounds]
        keys = np.concatenate([np.stack([r.high[cut], r.low[cut]], 1) for r, cut in zip(runs, cuts, strict=True)])
        values = np.concatenate([run.values[cut] for run, cut in zip(runs, cuts, strict=True)])
        first = distinct(keys)  # a process that died between two steps of a merge left keys twice
        yield keys[first, 0], keys[first, 1], values[first]


def distinct(keys: Keys) -> NDArray[np.int64]:
    """Places of the keys in ascending order, of equal ones the first."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ranked = keys[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    return order[new]


def _schema(width: int, dtype: np.dtype[Any], facts: Mapping[str, str | bytes]) -> pa.Schema:
    value = pa.list_(pa.from_numpy_dtype(dtype), width)
    return pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("value", value)], metadata=dict(facts))


def _wrapped(column: NDArray[Any]) -> pa.Array:
    """A column as Arrow sees it, without a copy: a mapped file stays on disk."""
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(column.dtype), column.size, [None, pa.py_buffer(np.ascontiguousarray(column))]
    )


def _arrays(batch: pa.RecordBatch, width: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
    if batch.schema.remove_metadata() != _schema(width, dtype, {}).remove_metadata():
        raise ValueError(f"columns are {batch.schema}")
    high, low, value = batch.columns
    flat = [(high, np.dtype(np.uint64)), (low, np.dtype(np.uint64)), (value.values, dtype)]
    high, low, values = (np.frombuffer(column.buffers()[1], kind, len(column)) for column, kind in flat)
    return high, low, values.reshape(-1, width)


def _checksum(columns: Sequence[NDArray[Any]]) -> int:
    crc = 0
    for column in columns:
        raw = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
        for start in range(0, len(raw), _CHECKED_AT_ONCE):
            crc = zlib.crc32(raw[start : start + _CHECKED_AT_ONCE].data, crc)
    return crc
