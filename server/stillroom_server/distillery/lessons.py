"""What students learn from, on disk: texts, each once, and lists of candidate passages that refer to them by row.

    FOLDER/texts.arrow    text: large_string; role: uint8 (0 query, 1 passage); source: uint16
    FOLDER/lists.arrow    query: int64; passages: fixed_size_list<int64>[k]; grades: fixed_size_list<int8>[k]; source: uint16
    FOLDER/lessons.json   names of the sources with what is known about them, counts, k, and a hash of both files

Arrow files are memory-mapped: a million texts cost no memory until they are read, and teachers' vectors and scores lie beside
them in the same order. Everything here is public text; the names of its sources end up in the release's manifest.

| case | what happens |
|---|---|
| the same text twice in one role | one row, that of the first; the first source keeps it |
| the same text as query and as passage | two rows |
| the same query with two lists | two lists; one, where both have the same passages and are added `once` |
| a list of another length than k, or one that names a row that is not there | refused |
| a writer that is left by an exception | nothing appears at `folder` |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stillroom_server.distillery.teachers.base import Role
from stillroom_shared.errors import DataError
from stillroom_shared.first_seen import FirstSeen
from stillroom_shared.sealed import new_folder

ROLES: tuple[Role, ...] = ("query", "passage")
_BATCH = 4_096
_TEXTS = pa.schema([("text", pa.large_string()), ("role", pa.uint8()), ("source", pa.uint16())])


def _lists_schema(candidates: int) -> pa.Schema:
    return pa.schema(
        [
            ("query", pa.int64()),
            ("passages", pa.list_(pa.int64(), candidates)),
            ("grades", pa.list_(pa.int8(), candidates)),
            ("source", pa.uint16()),
        ]
    )


@dataclass(frozen=True, eq=False)
class Lessons:
    """Opened for reading.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "lessons"
    >>> with LessonsWriter(folder, candidates=2) as writer:
    ...     zoo = writer.source("zoo", licence="CC0")
    ...     tapir, zebra = (writer.text(f"The {one} eats leaves.", "passage", zoo) for one in ("tapir", "zebra"))
    ...     writer.list(writer.text("what do tapirs eat", "query", zoo), [tapir, zebra], [1, 0], zoo)
    >>> lessons = Lessons.open(folder)
    >>> len(lessons), lessons.lists, lessons.candidates, lessons.texts(lessons.passages[0])
    (3, 1, 2, ['The tapir eats leaves.', 'The zebra eats leaves.'])
    >>> lessons.texts(lessons.rows("query")), lessons.grades.tolist(), lessons.sources
    (['what do tapirs eat'], [[1, 0]], {'zoo': {'licence': 'CC0'}})

    Attributes:
        folder: where they lie.
        description: the content of lessons.json.
    """

    folder: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map the files into memory. Raises `DataError` when there are none."""
        try:
            return cls(folder, json.loads((folder / "lessons.json").read_text()))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder} holds no lessons ({error}): prepare them with `stillroom distill run`"
            ) from error

    def __len__(self) -> int:
        """Number of texts."""
        return int(self.description["texts"])

    @property
    def lists(self) -> int:
        """Number of lists of candidates."""
        return int(self.description["lists"])

    @property
    def candidates(self) -> int:
        """Passages in each list."""
        return int(self.description["candidates"])

    @property
    def identity(self) -> str:
        """A hash of all texts and lists."""
        return str(self.description["hash"])

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """What is known about each source, by name."""
        return {one["name"]: one["facts"] for one in self.description["sources"]}

    @cached_property
    def _texts(self) -> pa.Table:
        return _mapped(self.folder / "texts.arrow")

    @cached_property
    def _lists(self) -> pa.Table:
        return _mapped(self.folder / "lists.arrow")

    def texts(self, rows: Sequence[int] | NDArray[np.integer] | slice) -> list[str]:
        """The texts of these rows."""
        column = self._texts["text"]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(column))
            found: list[str] = column.slice(start, stop - start).to_pylist()
        else:
            # Not `take`, which copies all texts together first: 60 ms a batch at a million.
            chunks, starts = column.chunks, self._starts
            homes = np.searchsorted(starts, wanted := np.asarray(rows, np.int64), side="right") - 1
            found = [
                chunks[home][row].as_py()
                for home, row in zip(homes.tolist(), (wanted - starts[homes]).tolist(), strict=True)
            ]
        return found

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first row of each chunk of texts."""
        lengths = [len(chunk) for chunk in self._texts["text"].chunks]
        return np.cumsum([0, *lengths[:-1]], dtype=np.int64)

    def rows(self, role: Role) -> NDArray[np.int64]:
        """Rows of all texts of a role, ascending."""
        return np.flatnonzero(self.roles == ROLES.index(role))

    def rows_of(self, *roles: Role) -> NDArray[np.int64]:
        """Rows of all texts of some roles, ascending."""
        return np.flatnonzero(np.isin(self.roles, [ROLES.index(role) for role in roles]))

    @cached_property
    def roles(self) -> NDArray[np.uint8]:
        """The index in `ROLES` of each text, (texts,)."""
        return np.asarray(self._texts["role"].to_numpy(), np.uint8)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Characters of each text, (texts,), which order texts like their tokens do."""
        return np.asarray(pc.utf8_length(self._texts["text"]).to_numpy(), np.int32)

    @cached_property
    def text_sources(self) -> NDArray[np.uint16]:
        """The number of the source of each text, as in `description["sources"]`, (texts,)."""
        return np.asarray(self._texts["source"].to_numpy(), np.uint16)

    @cached_property
    def list_sources(self) -> NDArray[np.uint16]:
        """The same of each list, (lists,)."""
        return np.asarray(self._lists["source"].to_numpy(), np.uint16)

    @cached_property
    def queries(self) -> NDArray[np.int64]:
        """The row of each list's query, (lists,)."""
        return np.asarray(self._lists["query"].to_numpy(), np.int64)

    @cached_property
    def passages(self) -> NDArray[np.int64]:
        """The rows of each list's candidates, (lists, k)."""
        return self._matrix("passages").astype(np.int64, copy=False)

    @cached_property
    def grades(self) -> NDArray[np.int8]:
        """Known relevance of each candidate, (lists, k): 0 is not known to be relevant."""
        return self._matrix("grades").astype(np.int8, copy=False)

    def _matrix(self, name: str) -> NDArray[Any]:
        column = self._lists[name].combine_chunks()
        values = column.flatten() if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks).flatten()
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, self.candidates)


class LessonsWriter:
    """Writes lessons into a new folder, which appears whole when the writer is left; holds `_BATCH` texts and lists in memory.

    `counts` are the texts and lists so far. `about` is kept in lessons.json as it is when the writer is left: JSON values
    that say how the lessons were made.
    """

    def __init__(self, folder: Path, *, candidates: int, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        if candidates < 1:
            raise DataError(f"candidates = {candidates}: a list has at least one passage")
        self._candidates = candidates
        self._about = about
        self._whole = new_folder(folder)
        self._sources: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._pending: dict[str, list[tuple[Any, ...]]] = {"texts": [], "lists": []}
        self.counts = {"texts": 0, "lists": 0}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._partial = opened.enter_context(self._whole)
            self._rows, self._once = opened.enter_context(FirstSeen()), opened.enter_context(FirstSeen())
            self._files = {
                "texts": pa.ipc.new_file(str(self._partial / "texts.arrow"), _TEXTS),
                "lists": pa.ipc.new_file(str(self._partial / "lists.arrow"), _lists_schema(self._candidates)),
            }
            opened.push(self._finish)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in self._files.items():
            if kind is None:
                self._flush(name)
            file.close()
        if kind is None:
            described = {
                **self.counts,
                "candidates": self._candidates,
                "sources": self._sources,
                "hash": self._digest.hexdigest(),
                "about": dict(self._about),
            }
            (self._partial / "lessons.json").write_text(json.dumps(described, indent=1) + "\n")

    def source(self, name: str, **facts: Any) -> int:
        """The number of a source; the same name again gives the same number. `facts` are JSON values."""
        for number, known in enumerate(self._sources):
            if known["name"] == name:
                return number
        self._sources.append({"name": name, "facts": facts})
        return len(self._sources) - 1

    def text(self, text: str, role: Role, source: int) -> int:
        """The row of a text, which is written if it is new."""
        number = ROLES.index(role)
        key = hashlib.blake2b(text.encode(), digest_size=15).digest() + bytes([number])
        row = self._rows.setdefault(key, self.counts["texts"])
        if row == self.counts["texts"]:
            self._put("texts", (text, number, source))
            self._digest.update(key)
        return row

    def texts(self, texts: Iterable[str], role: Role, source: int) -> list[int]:
        """The same for many."""
        return [self.text(text, role, source) for text in texts]

    def list(
        self, query: int, passages: Sequence[int], grades: Sequence[int], source: int, *, once: bool = False
    ) -> None:
        """Add candidates of a query, by rows. Raises `DataError` when the list does not fit.

        Args:
            once: not if the same query came with the same passages before, in a list that was to be there once too.
        """
        if len(passages) != self._candidates or len(grades) != self._candidates:
            raise DataError(
                f"a list has {len(passages)} passages and {len(grades)} grades, these lessons take {self._candidates}: "
                "mine more negatives, or set fewer candidates"
            )
        if wrong := [row for row in (query, *passages) if not 0 <= row < self.counts["texts"]]:
            raise DataError(f"a list names row {wrong[0]} of {self.counts['texts']} texts: write the text first")
        key, number = np.array([query, *passages], np.int64).tobytes(), self.counts["lists"]
        if once and self._once.setdefault(key, number) != number:
            return
        self._put("lists", (query, [*passages], [*grades], source))
        self._digest.update(json.dumps([query, [*passages], [*grades]]).encode())

    def _put(self, name: str, line: tuple[Any, ...]) -> None:
        self._pending[name].append(line)
        self.counts[name] += 1
        if len(self._pending[name]) >= _BATCH:
            self._flush(name)

    def _flush(self, name: str) -> None:
        lines, schema = self._pending[name], _TEXTS if name == "texts" else _lists_schema(self._candidates)
        if lines:
            columns = zip(*lines, strict=True)
            arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
            self._files[name].write_batch(pa.record_batch(arrays, schema=schema))
            self._pending[name] = []


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def batches(rows: Sequence[int] | NDArray[np.integer], size: int) -> Iterator[NDArray[np.int64]]:
    """Rows in chunks of `size`, the last one shorter."""
    all_rows = np.asarray(rows, np.int64)
    for start in range(0, len(all_rows), size):
        yield all_rows[start : start + size]
