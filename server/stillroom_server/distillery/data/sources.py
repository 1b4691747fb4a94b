"""Public text from where it lies into lessons of single judged pairs, one folder a source, made once.

| kind | passages | queries | judgements |
|---|---|---|---|
| beir | corpus.jsonl with titles | of the train qrels, and dev where it is asked for; never test | of these splits |
| huggingface | a column, streamed (`huggingface`) | a column | each row is one; further passages are not judged |
| docstrings | bodies | summary lines of these splits (a hash of the query) | a summary belongs to its body |
| documentation | sections of shipped texts (`documentation`) | none | none |
| wordnet | none | sets of synonyms with their definitions (`wordnet`) | none |
| questions | none | frames with WordNet's words in them (`questions`) | none |

Memory: of a BEIR folder the ids of queries that are learned from and of their passages are held, texts are not. What is known
about a source (licence, versions or revision, counts, a hash of its content) ends up in the release's manifest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillroom_server.distillery.data.documentation import sections
from stillroom_server.distillery.data.huggingface import Row, opened
from stillroom_server.distillery.data.intake import Intake
from stillroom_server.distillery.data.leakage import Excluded
from stillroom_server.distillery.data.questions import questions, read_words
from stillroom_server.distillery.data.sampling import Lowest, mark, on_disk, sample
from stillroom_server.distillery.data.settings import SourceSettings
from stillroom_server.distillery.data.wordnet import FOLDER as WORDNET
from stillroom_server.distillery.data.wordnet import LICENCE, definitions, release
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.docstrings import STANDARD_LIBRARY, DocstringSource, docstring_corpus
from stillroom_shared.beir import beir_files, read_judgements, read_lines
from stillroom_shared.corpus import Corpus, normalize
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import content_key

Progress = Callable[[int, int], None]
Facts = dict[str, Any]
_LAST: dict[DocstringSource, Corpus] = {}
"""The docstrings that were read last (`_parsed`)."""


def gather(
    settings: SourceSettings,
    folder: Path,
    *,
    excluded: Excluded,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> Lessons:
    """Read one source into `folder`, which appears when it is complete.

    Args:
        progress: (done, total) of the source's own unit; total is 0 where nobody knows it, as in a stream.

    Returns:
        Lessons of one candidate; `description["about"]` holds the facts.

    Raises:
        DataError: nothing is left, or the input is malformed: naming file and line, or row and column.
    """
    about: Facts = {}
    with LessonsWriter(folder, candidates=1, about=about) as writer:
        intake = Intake(writer, excluded, name=settings.title, characters=settings.characters)
        about |= {"kind": settings.kind, "use": settings.use, "licence": settings.licence or "not stated"}
        about |= _READERS[settings.kind](settings, intake, seed, progress)
        about |= {"left_out": dict(sorted(intake.counts.items()))}
        if not writer.counts["texts"]:
            raise DataError(f"source {settings.title!r} gives no text: left out were {about['left_out']}")
        about |= writer.counts
    return Lessons.open(folder)


def source_key(settings: SourceSettings) -> str:
    """Changes when what a local source reads from does: content of files, versions of packages."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    if settings.kind in ("docstrings", "documentation"):
        digest.update(repr(versions_of(settings.packages)).encode())
    elif (folder := _folder(settings)).exists():
        digest.update(content_key(folder).encode())
    return digest.hexdigest()[:16]


def content_of(name: str) -> str:
    """Changes when the files of a folder do, of a model say; what is no folder is a name, and stands for itself."""
    return source_key(SourceSettings(kind="beir", data=name))


def _beir(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    folder = Path(settings.data).expanduser()
    files = beir_files(folder)
    wanted: dict[str, list[tuple[str, int]]] = {}
    found = [split for split in settings.splits if split in files.qrels and settings.use != "passages"]
    if settings.use != "passages" and not found:
        raise DataError(
            f"source {settings.title!r}: {folder} has no {' or '.join(settings.splits)} judgements, only "
            f"{', '.join(files.qrels)}; test queries are never learned from, set use to passages"
        )
    for one in (one for split in found for one in read_judgements(files, split)):
        wanted.setdefault(one.query, []).append((one.passage, one.score))
    rows = _queries(settings, intake, seed, files.queries, wanted)
    facts: Facts = {"splits": found}
    if settings.use == "queries":
        return facts
    needed = {passage for query in rows for passage, _ in wanted[query]}
    passages: dict[str, int | None] = {}

    def further() -> Iterator[str]:
        for number, line in enumerate(read_lines(files.corpus, owner="", public=True), start=1):
            progress(number, 0)
            if line.passage.id in needed:
                passages[line.passage.id] = intake.passage(line.passage.full_text)
            else:
                yield line.passage.full_text

    for text in sample(further(), {"passages": settings.passages}, key=_passage_key, seed=seed):
        intake.passage(text)
    if missing := sorted(needed - passages.keys()):
        raise DataError(f"{folder}: passage {missing[0]!r} is judged, but not in {files.corpus.name}: add it")
    for query, row in rows.items():
        for passage, score in wanted[query]:
            intake.pair(row, passages[passage], score)
    return facts


def _queries(
    settings: SourceSettings, intake: Intake, seed: int, path: Path, wanted: dict[str, list[tuple[str, int]]]
) -> dict[str, int | None]:
    """The row of each chosen query by id, None for one that stayed outside."""
    if not wanted:
        return {}
    judged = (line.passage for line in read_lines(path, owner="", public=True) if line.passage.id in wanted)
    limits = {"queries": settings.queries}
    chosen = sample(judged, limits, key=lambda query: ("queries", normalize(query.text)), seed=seed)
    rows = {query.id: intake.query(query.text) for query in chosen}
    if settings.queries is None and (missing := sorted(wanted.keys() - rows.keys())):
        raise DataError(f"{path}: query {missing[0]!r} is judged, but not there: add it")
    return {query: row for query, row in rows.items() if row is not None}


def _huggingface(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    stream, facts = opened(settings)

    def counted() -> Iterator[Row]:
        for number, row in enumerate(stream, start=1):
            progress(number, 0)
            yield row

    _take(_sampled(counted(), settings, seed), intake)
    return facts


def _docstrings(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    corpus = _parsed(DocstringSource(name=settings.title, public=settings.packages, private=()), progress)
    text = {passage.id: passage.full_text for passage in corpus.passages}

    def rows() -> Iterator[Row]:
        for query in corpus.queries:
            learned = query.split in settings.splits and settings.use != "passages"
            bodies = tuple(text[passage] for passage in corpus.qrels[query.id]) if settings.use != "queries" else ()
            if learned or bodies:
                yield Row(query.text if learned else "", bodies, ())

    _take(_sampled(rows(), settings, seed), intake)
    return {**_packages(settings), "corpus": corpus.content_hash}


def _parsed(source: DocstringSource, progress: Progress) -> Corpus:
    """The corpus; the last one stays, for a process that makes one recipe after another: to parse it takes most of a minute."""
    if source not in _LAST:
        found = docstring_corpus(source, workers=1, progress=progress)
        _LAST.clear()
        _LAST[source] = found
    return _LAST[source]


def _documentation(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    found = sections(settings.packages, progress=progress)
    for text in sample(found, {"passages": settings.passages}, key=_passage_key, seed=seed):
        intake.passage(text)
    return _packages(settings)


def _wordnet(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    folder = _folder(settings)

    def rows() -> Iterator[Row]:
        for number, text in enumerate(definitions(folder), start=1):
            progress(number, 0)
            yield Row(text, (), ())

    _take(_sampled(rows(), settings, seed), intake)
    return _released(settings)


def _questions(settings: SourceSettings, intake: Intake, seed: int, progress: Progress) -> Facts:
    count = settings.queries
    assert count is not None  # `SourceSettings` asks for it
    for number, text in enumerate(questions(read_words(_folder(settings)), count, seed=seed), start=1):
        progress(number, count)
        intake.query(text)
    return _released(settings)


def _released(settings: SourceSettings) -> Facts:
    return {"release": release(_folder(settings)), "licence": settings.licence or LICENCE}


def _folder(settings: SourceSettings) -> Path:
    """Where a source of files lies."""
    return Path(settings.data).expanduser() if settings.data else WORDNET


def _sampled(rows: Iterator[Row], settings: SourceSettings, seed: int) -> Iterator[Row]:
    """Rows with a query by the hash of that, and passages that none of these needs by their own, each under its own limit."""
    if settings.queries is not None and settings.passages != 0 and settings.use == "pairs":
        return _with_other_passages(rows, settings.queries, settings.passages, seed)
    limits = {"queries": settings.queries, "passages": settings.passages}
    return sample(rows, limits, key=_row_key, seed=seed)


def _with_other_passages(rows: Iterator[Row], queries: int, passages: int | None, seed: int) -> Iterator[Row]:
    """The chosen rows, then passages of the others: a corpus is no smaller because few queries are asked of it."""
    lowest = Lowest(queries)

    def offered() -> Iterator[Row]:
        for row in rows:
            if row.query:
                lowest.offer(mark(normalize(row.query), seed))
            yield row

    def chosen(row: Row) -> bool:
        return bool(row.query) and mark(normalize(row.query), seed) in lowest

    with on_disk(offered()) as again:
        needed = set[int]()
        for row in filter(chosen, again()):
            needed.update(mark(normalize(text), seed) for text in (*row.passages, *row.others))
            yield row
        rest = (text for row in again() if not chosen(row) for text in (*row.passages, *row.others))
        others = (text for text in rest if mark(normalize(text), seed) not in needed)
        for text in sample(others, {"passages": passages}, key=_passage_key, seed=seed):
            yield Row("", (text,), ())


def _take(rows: Iterator[Row], intake: Intake) -> None:
    for row in rows:
        query = intake.query(row.query) if row.query else None
        for text in row.passages:
            passage = intake.passage(text)
            if row.query:
                intake.pair(query, passage)
        for text in row.others:
            intake.passage(text)


def _row_key(row: Row) -> tuple[str, str]:
    return ("queries", normalize(row.query)) if row.query else ("passages", normalize("\n".join(row.passages)))


def _passage_key(text: str) -> tuple[str, str]:
    return "passages", normalize(text)


def _packages(settings: SourceSettings) -> Facts:
    packages = versions_of(settings.packages)
    licences = "; ".join(sorted({one["licence"] for one in packages.values()}))
    return {"packages": packages, "licence": settings.licence or licences}


def versions_of(packages: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Version and licence of each package by import name. Raises `DataError` for one that is not installed."""
    distributions = importlib.metadata.packages_distributions()
    known = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            known[package] = {"version": platform.python_version(), "licence": "PSF-2.0"}
        elif names := distributions.get(package):
            described = importlib.metadata.metadata(names[0]).json
            licence = str(described.get("license_expression") or described.get("license") or "not stated")
            known[package] = {"version": str(described["version"]), "licence": licence.partition("\n")[0][:80]}
        else:
            raise DataError(f"package {package!r} is not installed: install it, or leave it out of `packages`")
    return known


_READERS: dict[str, Callable[[SourceSettings, Intake, int, Progress], Facts]] = {
    "beir": _beir,
    "huggingface": _huggingface,
    "docstrings": _docstrings,
    "documentation": _documentation,
    "wordnet": _wordnet,
    "questions": _questions,
}
