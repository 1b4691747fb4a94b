"""A corpus from a folder in BEIR layout (Thakur et al. 2021, arXiv 2104.08663).

    FOLDER/corpus.jsonl     {"_id": str, "text": str, "title"?: str, "metadata"?: {"owner"?: str}}
    FOLDER/queries.jsonl    {"_id": str, "text": str, "metadata"?: {"owner"?: str, "topic"?: str}}
    FOLDER/qrels/SPLIT.tsv  query-id <tab> corpus-id <tab> integer score; SPLIT is train, dev or test

Each file may be gzipped (`.gz`), but not be there twice. A malformed one raises `DataError` with file, line and field.

| case | what happens |
|---|---|
| no `metadata.owner` | the owner is named after the folder |
| no `metadata.topic`, but `metadata.focus` | that is the topic (so MedQuAD calls it) |
| no header in a qrels file | accepted; a header must be `query-id corpus-id score` |
| a score of 0 or below | kept: judged, and not relevant |
| a judgement repeated | accepted when the scores agree, refused when they do not |
| a query without a judgement | left out (nothing can be measured on it), counted in `Corpus.notes` |
| an empty passage | kept: published sets have them; an empty query is refused |
| train, dev and test are all there | kept as published |
| one of them is missing | judged queries are pooled and split again by a hash of their text; `Corpus.notes` says so |
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, cast

from stillroom_shared.corpus import SPLITS, Corpus, Passage, Query, Split, split_of
from stillroom_shared.errors import DataError
from stillroom_shared.first_seen import FirstSeen

Splits = Literal["three-way", "as-published"]

_HEADER = ["query-id", "corpus-id", "score"]
_SCORE = re.compile("-?[0-9]{1,9}")
_LINES_PER_REPORT = 1_024


def load_beir(
    folder: Path,
    *,
    splits: Splits = "three-way",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Corpus:
    """Read a folder in BEIR layout; `progress(done, total)` counts bytes as they lie on disk.

    Args:
        splits: "three-way" gives train, dev and test, pooling and splitting again where the folder lacks one;
            "as-published" keeps what the folder says, to measure on a set as others have.

    Raises:
        DataError: naming file, line and field.
    """
    if splits not in ("three-way", "as-published"):
        raise DataError(f'splits {splits!r} is unknown: choose "three-way" or "as-published"')
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    corpus_file, queries_file = (_only(folder, f"{stem}.jsonl") for stem in ("corpus", "queries"))
    qrels_files = _qrels_files(folder / "qrels")
    reader = _Reader(sum(path.stat().st_size for path in (corpus_file, queries_file, *qrels_files.values())), progress)

    name = folder.resolve().name
    passages = {passage.id: passage for passage in reader.passages(corpus_file, name)}
    texts = {r.id: (r.owner or name, r.question(), r.topic) for r in reader.records(queries_file)}
    known = {"query-id": (queries_file, set(texts)), "corpus-id": (corpus_file, set(passages))}
    qrels, published = _judged(reader, qrels_files, known)
    pooled = splits == "three-way" and len(qrels_files) < len(SPLITS)
    queries = tuple(
        Query(key, owner, text, split_of(text) if pooled else published[key], topic)
        for key, (owner, text, topic) in texts.items()
        if key in qrels
    )
    return Corpus(
        name, tuple(passages.values()), queries, qrels, _notes(queries, tuple(qrels_files), pooled, len(texts))
    )


def read_passages(path: Path, *, owner: str) -> tuple[Passage, ...]:
    """The passages of one file like corpus.jsonl, whatever its name; `owner` has those that name none.

    Raises:
        DataError: naming file, line and field.
    """
    return tuple(line.passage for line in read_lines(path, owner=owner))


@dataclass(frozen=True, slots=True)
class Line:
    """A passage of a file like corpus.jsonl, its line number, and those of its metadata that are strings or numbers."""

    passage: Passage
    number: int
    metadata: dict[str, str | int | float | bool]


def read_lines(path: Path, *, owner: str, public: bool = False) -> Iterator[Line]:
    """The same one after the other; what is `public` however long the file is, for its ids are on disk (`first_seen`)."""
    for record in _Reader(path.stat().st_size, lambda done, total: None, public=public).records(path):
        yield Line(record.passage(owner), record.place.line, record.scalars)


@dataclass(frozen=True, slots=True)
class BeirFiles:
    """Where the parts of a folder lie, to read one after the other what does not fit in memory."""

    corpus: Path
    queries: Path
    qrels: dict[Split, Path]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One row of a qrels file."""

    query: str
    passage: str
    score: int


def beir_files(folder: Path) -> BeirFiles:
    """The files of a folder in BEIR layout, which are not read. Raises `DataError` when one is missing or twice there."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    return BeirFiles(_only(folder, "corpus.jsonl"), _only(folder, "queries.jsonl"), _qrels_files(folder / "qrels"))


def read_judgements(files: BeirFiles, split: Split) -> Iterator[Judgement]:
    """The rows of one split, whose ids are not checked. Raises `DataError`: naming file, line and field."""
    for _, query, passage, score in _Reader(0, lambda done, total: None).judgements(files.qrels[split]):
        yield Judgement(query, passage, score)


def _judged(
    reader: _Reader, files: dict[Split, Path], known: dict[str, tuple[Path, set[str]]]
) -> tuple[dict[str, dict[str, int]], dict[str, Split]]:
    """Judgements by query, and the split each query is published in; `known` are the ids each column may name."""
    qrels: dict[str, dict[str, int]] = {}
    published: dict[str, Split] = {}
    for split, path in files.items():
        for place, query, passage, score in reader.judgements(path):
            for (field, (home, ids)), value in zip(known.items(), (query, passage), strict=True):
                if value not in ids:
                    place.refuse(field, f"{value!r} does not occur in {home.name}; add it there or drop this row")
            if (first := published.setdefault(query, split)) != split:
                place.refuse("query-id", f"query {query!r} is already judged in {first}; keep it in one split")
            if (score_before := qrels.setdefault(query, {}).setdefault(passage, score)) != score:
                place.refuse("score", f"{score} for {query!r} and {passage!r}, which had {score_before}; keep one")
    return qrels, published


def _notes(queries: tuple[Query, ...], found: tuple[Split, ...], pooled: bool, total: int) -> tuple[str, ...]:
    notes = []
    if pooled:
        shares = ", ".join(f"{sum(q.split == split for q in queries):,} {split}" for split in SPLITS)
        notes.append(
            f"only {' and '.join(found)} judgements are published: all {len(queries):,} judged queries were pooled and "
            f"split again by a hash of the query ({shares}), so figures do not compare with published ones"
        )
    if left_out := total - len(queries):
        notes.append(f"{left_out:,} of {total:,} queries have no judgement and were left out")
    return tuple(notes)


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of a file, to name in an error."""

    path: Path
    line: int

    def refuse(self, field: str | None, complaint: str) -> NoReturn:
        named = f", field {field!r}" if field else ""
        raise DataError(f"{self.path}, line {self.line}{named}: {complaint}")


@dataclass(frozen=True, slots=True)
class _Record:
    """One JSON object of corpus.jsonl or queries.jsonl, not yet trusted."""

    place: _Place
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return self._non_empty("_id")

    @property
    def owner(self) -> str:
        """`metadata.owner`, which is not empty, or "" when there is none."""
        described = self._metadata
        return "" if described.fields.get("owner") is None else described._non_empty("owner", "metadata.owner")

    @property
    def topic(self) -> str:
        """`metadata.topic`, or `metadata.focus`, or "" when there is neither."""
        described = self._metadata
        return described.optional_text("topic", "metadata.topic") or described.optional_text("focus", "metadata.focus")

    @property
    def _metadata(self) -> _Record:
        """What describes it; nothing when that is missing or null."""
        metadata = self.fields.get("metadata")
        if not isinstance(metadata, dict | None):
            self.place.refuse("metadata", f"must be an object, not {_shown(metadata)}")
        return _Record(self.place, metadata or {})

    def text(self, field: str, shown_as: str | None = None) -> str:
        named = shown_as or field
        if field not in self.fields:
            self.place.refuse(named, "is missing; add it")
        value = self.fields[field]
        if not isinstance(value, str):
            self.place.refuse(named, f"must be a string, not {_shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no UTF-8 can hold
            self.place.refuse(named, f"has half a surrogate pair at character {error.start}; write the whole character")
        return value

    def optional_text(self, field: str, shown_as: str | None = None) -> str:
        """A string that may be missing or null: then it is empty."""
        return "" if self.fields.get(field) is None else self.text(field, shown_as)

    def passage(self, owner: str) -> Passage:
        """This line of corpus.jsonl; `owner` has it if it names none."""
        return Passage(self.id, self.owner or owner, self.text("text"), self.optional_text("title"))

    @property
    def scalars(self) -> dict[str, str | int | float | bool]:
        """Metadata that a filter can compare; the rest, and what cannot be stored, is left out."""
        kept = {key: value for key, value in self._metadata.fields.items() if isinstance(value, str | int | float)}
        return {key: value for key, value in kept.items() if key != "owner" and _storable(key) and _storable(value)}

    def question(self) -> str:
        """The text of a query, which must have something to search for."""
        return self._non_empty("text")

    def _non_empty(self, field: str, shown_as: str | None = None) -> str:
        value = self.text(field, shown_as)
        if not value.strip():
            self.place.refuse(shown_as or field, "is empty; fill it or drop the line")
        return value


@dataclass
class _Reader:
    """Reads lines with their numbers, plain or gzipped, and reports how many bytes on disk are done."""

    total: int
    progress: Callable[[int, int], None]
    done: int = 0
    public: bool = False

    def records(self, path: Path) -> Iterator[_Record]:
        with FirstSeen() if self.public else nullcontext(dict[bytes, int]()) as seen:
            record = None
            for record in self._records(path, seen):
                yield record
        if record is None:
            raise DataError(f"{path} holds no record: it must have one JSON object a line")

    def _records(self, path: Path, seen: FirstSeen | dict[bytes, int]) -> Iterator[_Record]:
        for place, line in self._lines(path):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                place.refuse(None, f"is not JSON ({error}); each line must be one object")
            if not isinstance(fields, dict):
                place.refuse(None, f"must be a JSON object, not {_shown(fields)}")
            record = _Record(place, fields)
            if (first := seen.setdefault(record.id.encode(errors="surrogatepass"), place.line)) != place.line:
                place.refuse("_id", f"{record.id!r} is already on line {first}; every _id must be unique")
            yield record

    def passages(self, path: Path, owner: str) -> Iterator[Passage]:
        for record in self.records(path):
            yield record.passage(owner)

    def judgements(self, path: Path) -> Iterator[tuple[_Place, str, str, int]]:
        """(place, query id, passage id, score) of each row."""
        count = 0
        for place, line in self._lines(path):
            columns = [column.strip() for column in line.split("\t")]
            if place.line == 1 and [column.casefold() for column in columns] == _HEADER:
                continue
            if len(columns) != len(_HEADER):
                missing = _HEADER[len(columns)] if len(columns) < len(_HEADER) else None
                place.refuse(missing, f"{len(columns)} tab-separated columns; needed are query-id, corpus-id and score")
            if not _SCORE.fullmatch(columns[2]):
                place.refuse(
                    "score", f"{columns[2]!r} is not an integer; a header line must read {' '.join(_HEADER)!r}"
                )
            count += 1
            yield place, columns[0], columns[1], int(columns[2])
        if not count:
            raise DataError(f"{path} holds no judgement: fill it or remove the file")

    def _lines(self, path: Path) -> Iterator[tuple[_Place, str]]:
        """Lines that are not blank, decoded."""
        number = 0
        try:
            with path.open("rb") as raw:
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
                for number, line in enumerate(stream, start=1):
                    if number % _LINES_PER_REPORT == 0:
                        self.progress(self.done + raw.tell(), self.total)
                    if text := _decoded(_Place(path, number), line):
                        yield _Place(path, number), text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}, after line {number}: the gzip stream is damaged ({error}); copy the file again"
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        self.done += path.stat().st_size
        self.progress(self.done, self.total)


def _storable(value: str | int | float) -> bool:
    """Not half a surrogate pair, not infinite, and within SQLite's integers."""
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return abs(value) < 2**63


def _decoded(place: _Place, line: bytes) -> str:
    try:
        return (line.removeprefix(codecs.BOM_UTF8) if place.line == 1 else line).decode().strip("\r\n ")
    except UnicodeDecodeError as error:
        place.refuse(None, f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; convert the file")


def _only(folder: Path, name: str) -> Path:
    """The plain or the gzipped file of that name; neither and both are refused."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if len(found) != 1:
        state = (
            "is there twice, plain and gzipped: remove one" if found else "is missing: add it, plain or gzipped (.gz)"
        )
        raise DataError(f"{folder / name} {state}")
    return found[0]


def _qrels_files(folder: Path) -> dict[Split, Path]:
    """The qrels file of each published split, in the order train, dev, test."""
    files = [path.name.removesuffix(".gz") for path in folder.glob("*") if path.name.endswith((".tsv", ".tsv.gz"))]
    names = {name.removesuffix(".tsv") for name in files}
    accepted = ", ".join(f"{split}.tsv" for split in SPLITS)
    if not names:
        raise DataError(f"{folder} has no SPLIT.tsv: it must hold at least one of {accepted}")
    if unknown := sorted(names - set(SPLITS)):
        raise DataError(f"{folder / unknown[0]}.tsv names no split that is known: name it one of {accepted}")
    return {split: _only(folder, f"{split}.tsv") for split in SPLITS if split in names}


def _shown(value: object) -> str:
    return f"{type(value).__name__} {json.dumps(value)[:40]}"
