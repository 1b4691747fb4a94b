"""The vector index on disk: FAISS' bytes, the store rows they stand for, and a seal; loaded whole or not at all.

The file is what `faiss.read_index` reads, then the rows (8 bytes each, ascending), a footer (generation, up to where the store
was read, kind), a mark, and a SHA-256 of all before it. A file is used when all of this holds and its generation is of the
store's own past (`History.has_vectors_of`); otherwise it is

| fault | when |
|---|---|
| missing | there is no file |
| torn | it is cut short, altered, unreadable or not ours |
| stale | it is whole, but of another history, or too far behind |

The hash finds accidents. It is no protection from somebody who may write to the owner's files; nothing in a home is.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from stillroom_client.history import Mark
from stillroom_client.index_plan import Kind, make
from stillroom_client.store import Generation
from stillroom_shared.errors import EncryptionError
from stillroom_shared.files import replace_file
from stillroom_shared.vault import PLAIN, Vault

Fault = Literal["missing", "torn", "stale"]
Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]
Batches = Iterable[tuple[Rows, Vectors]]

_MARK = b"stillroom index 2"
_TAIL = struct.Struct(f">I{len(_MARK)}s")  # length of the footer, mark
_DIGEST_BYTES = 32
SEALED_AS = "index of vectors"  # whatever the file is called while it waits to be put in use


@dataclass(frozen=True, eq=False)
class Base:
    """Vectors of the store rows up to a mark, as one FAISS index; never changed once made, so threads share it.

    Attributes:
        generation: of the store, when the last of them was read.
        mark: its row is the last one read. Its removal is the last one known when the index was built from nothing: rows that
            went since are in it still, and are left out of every search.
        rows: (n,), ascending; FAISS counts positions in it.
    """

    generation: Generation
    mark: Mark
    kind: Kind
    rows: Rows
    faiss: faiss.Index

    @classmethod
    def build(
        cls, kind: Kind, generation: Generation, mark: Mark, count: int, sample: Vectors, batches: Batches
    ) -> Base:
        """Of `count` vectors, learning from a sample (m, dim), adding batches of rows (n,) and vectors (n, dim)."""
        with one_thread():
            index = make(kind, count, sample)
            rows = _added(index, batches)
        return cls(generation, mark, kind, rows, index)

    def extended(self, generation: Generation, mark: Mark, batches: Batches) -> Base:
        """With rows that came since. This one is spent: FAISS adds in place."""
        with one_thread():
            rows = np.concatenate([self.rows, _added(self.faiss, batches)])
        return Base(generation, Mark(mark.row, self.mark.removal), self.kind, rows, self.faiss)

    @property
    def lists(self) -> int:
        """Lists of an inverted file; 0 for other kinds."""
        return int(getattr(self.faiss, "nlist", 0))

    def save(self, path: Path, vault: Vault = PLAIN) -> None:
        """Replace the file, sealed, in one step; a crash leaves the old file or the new one. One caller at a time."""
        known = {**asdict(self.generation), "mark": asdict(self.mark), "kind": self.kind, "count": len(self.rows)}
        footer = json.dumps(known).encode()
        parts = (
            faiss.serialize_index(self.faiss).data,
            self.rows.astype("<i8").data.cast("B"),
            footer,
            _TAIL.pack(len(footer), _MARK),
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        replace_file(path, *vault.seal(SEALED_AS, *parts, digest.digest()))

    @classmethod
    def load(cls, path: Path, vault: Vault = PLAIN) -> Base | Fault:
        """The saved index, or why there is none."""
        try:
            whole = memoryview(vault.open(SEALED_AS, path.read_bytes()))
        except FileNotFoundError:
            return "missing"
        except (OSError, EncryptionError):
            return "torn"
        content, digest = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
        # FAISS trusts what it reads: nothing reaches it that is not what `save` wrote.
        if len(content) < _TAIL.size or hashlib.sha256(content).digest() != digest:
            return "torn"
        length, mark = _TAIL.unpack(content[-_TAIL.size :])
        if mark != _MARK:
            return "torn"
        footer = json.loads(bytes(content[-_TAIL.size - length : -_TAIL.size]))
        end = len(content) - _TAIL.size - length
        start = end - 8 * footer["count"]
        return cls(
            Generation(footer["number"], footer["stamp"]),
            Mark(**footer["mark"]),
            footer["kind"],
            np.frombuffer(content[start:end], "<i8").astype(np.int64),
            faiss.deserialize_index(np.frombuffer(content[:start], np.uint8)),
        )


def _added(index: faiss.Index, batches: Batches) -> Rows:
    rows = [np.zeros(0, np.int64)]
    for some, vectors in batches if index.is_trained else ():
        index.add(np.ascontiguousarray(vectors))
        rows.append(some)
    return np.concatenate(rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """A second thread saves a fraction of a millisecond on an idle machine; on a busy one, waiting for it cost 40 ms.

    Restored afterwards: the number belongs to the calling thread's OpenMP, which torch in the same process shares.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
