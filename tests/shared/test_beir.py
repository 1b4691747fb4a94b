"""The BEIR loader: what it keeps, how it splits, and that every malformed folder is refused by file, line and field."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import split_of
from stillroom_shared.errors import DataError

DATA = Path(os.environ.get("STILLROOM_DATA", Path(__file__).parents[3] / "shared" / "data"))

PASSAGES: list[dict[str, Any]] = [
    {"_id": "p1", "title": "Tapirs", "text": "They eat leaves.", "metadata": {"owner": "zoo"}},
    {"_id": "p2", "text": "A still heats wine.", "metadata": {"owner": "museum", "url": "x"}},
    {"_id": "p3", "title": None, "text": "", "metadata": {}},
]
QUERIES: list[dict[str, Any]] = [
    {"_id": "q1", "text": "what do tapirs eat", "metadata": {"owner": "zoo"}},
    {"_id": "q2", "text": "how is brandy made"},
    {"_id": "q3", "text": "nobody judged this"},
    {"_id": "q4", "text": "empty passages"},
]
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = {"train": HEADER + "q1\tp1\t2\nq1\tp2\t0\n", "test": "q2\tp2\t1\nq4\tp3\t-1\n"}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A well-formed folder: owners on some lines, one header, one qrels file without, an empty passage."""
    root = tmp_path / "larder"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text(lines(PASSAGES))
    (root / "queries.jsonl").write_text(lines(QUERIES))
    for split, rows in QRELS.items():
        (root / "qrels" / f"{split}.tsv").write_text(rows)
    return root


def test_content(folder: Path) -> None:
    """A lost title, owner or grade changes every figure and no error shows it."""
    corpus = load_beir(folder, splits="as-published")
    assert corpus.name == "larder"
    assert [(p.id, p.owner, p.title, p.text) for p in corpus.passages] == [
        ("p1", "zoo", "Tapirs", "They eat leaves."),
        ("p2", "museum", "", "A still heats wine."),
        ("p3", "larder", "", ""),
    ]
    assert [(q.id, q.owner, q.text, q.split) for q in corpus.queries] == [
        ("q1", "zoo", "what do tapirs eat", "train"),
        ("q2", "larder", "how is brandy made", "test"),
        ("q4", "larder", "empty passages", "test"),
    ]
    assert corpus.qrels == {"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}, "q4": {"p3": -1}}
    assert corpus.notes == ("1 of 4 queries have no judgement and were left out",)


def test_topics_are_read_and_change_the_content_hash(folder: Path) -> None:
    """Devices are made of topics: another grouping of the same text is another experiment."""
    plain = load_beir(folder)
    described = [{}, {"topic": "spirits"}, {"focus": "law"}, {"focus": "", "topic": None}]
    queries = [query | {"metadata": metadata} for query, metadata in zip(QUERIES, described, strict=True)]
    (folder / "queries.jsonl").write_text(lines(queries))
    (folder / "qrels" / "dev.tsv").write_text(HEADER + "q3\tp1\t1\n")
    corpus = load_beir(folder)
    assert [query.topic for query in corpus.queries] == ["", "spirits", "law", ""]
    (folder / "queries.jsonl").write_text(lines([query | {"metadata": {}} for query in QUERIES]))
    assert len({plain.content_hash, corpus.content_hash, load_beir(folder).content_hash}) == 3


def test_gzip_byte_order_mark_and_line_ends_change_nothing(folder: Path) -> None:
    """The same data in another wrapping must have the same content hash, or figures would not compare."""
    expected = load_beir(folder)
    for path in [folder / "corpus.jsonl", folder / "queries.jsonl", *sorted((folder / "qrels").iterdir())]:
        data = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
        path.unlink()
    again = load_beir(folder)
    assert (again, again.content_hash) == (expected, expected.content_hash)


def test_missing_split_is_pooled_and_split_again(folder: Path) -> None:
    """Reporting on re-split queries as if they were the published test set would be a false comparison."""
    corpus = load_beir(folder)
    assert {q.id: q.split for q in corpus.queries} == {q.id: split_of(q.text) for q in corpus.queries}
    assert "only train and test" in corpus.notes[0] and "do not compare" in corpus.notes[0]
    (folder / "qrels" / "dev.tsv").write_text(HEADER + "q3\tp1\t1\n")
    complete = load_beir(folder)
    assert {q.id: q.split for q in complete.queries} == {"q1": "train", "q2": "test", "q3": "dev", "q4": "test"}
    assert complete.notes == ()
    # Guard: at least one query is published in another split than its hash says, so keeping and pooling differ.
    assert any(q.split != split_of(q.text) for q in complete.queries)


def test_repeated_judgement_that_agrees_is_one(folder: Path) -> None:
    """Published sets repeat rows; refusing them would lock their users out, counting twice would skew grades."""
    (folder / "qrels" / "test.tsv").write_text("q2\tp2\t1\nq2\tp2\t1\n")
    assert load_beir(folder).qrels["q2"] == {"p2": 1}


def test_progress_ends_at_the_total_and_never_falls(folder: Path) -> None:
    """A bar that stops at 97% or runs backwards looks like a hang."""
    (folder / "corpus.jsonl").write_text(lines([{"_id": f"p{i}", "text": "word " * 20} for i in range(5_000)]))
    seen: list[tuple[int, int]] = []
    load_beir(folder, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and len(done) > 6
    assert set(totals) == {sum(p.stat().st_size for p in folder.rglob("*.*"))} == {done[-1]}


def replace(file: str, line: int, text: str | bytes) -> Callable[[Path], object]:
    """Put other bytes in place of one line (counted from 1)."""

    def change(folder: Path) -> None:
        rows = (folder / file).read_bytes().splitlines(keepends=True)
        rows[line - 1] = (text if isinstance(text, bytes) else text.encode()) + b"\n"
        (folder / file).write_bytes(b"".join(rows))

    return change


def write(file: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(data)


def as_gzip(damage: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "corpus.jsonl").unlink()
        (folder / "corpus.jsonl.gz").write_bytes(damage(gzip.compress(lines(PASSAGES).encode() * 400)))

    return change


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not JSON": (replace("corpus.jsonl", 2, "{'_id': 1}"), r"corpus\.jsonl, line 2: is not JSON"),
    "deep JSON": (replace("corpus.jsonl", 2, "[" * 200_000), r"corpus\.jsonl, line 2: is not JSON"),
    "not an object": (replace("queries.jsonl", 1, "[1]"), r"queries\.jsonl, line 1: must be a JSON object, not list"),
    "no _id": (replace("corpus.jsonl", 3, '{"text": "a"}'), r"corpus\.jsonl, line 3, field '_id': is missing"),
    "numeric _id": (replace("corpus.jsonl", 1, '{"_id": 7, "text": "a"}'), r"line 1, field '_id': .*not int 7"),
    "empty _id": (replace("corpus.jsonl", 1, '{"_id": " ", "text": "a"}'), r"line 1, field '_id': is empty"),
    "duplicate _id": (
        replace("queries.jsonl", 4, '{"_id": "q1", "text": "a b"}'),
        r"queries\.jsonl, line 4, field '_id': 'q1' is already on line 1",
    ),
    "no text": (replace("corpus.jsonl", 2, '{"_id": "p2"}'), r"corpus\.jsonl, line 2, field 'text': is missing"),
    "null text": (replace("corpus.jsonl", 2, '{"_id": "p2", "text": null}'), r"field 'text': .*NoneType null"),
    "list title": (replace("corpus.jsonl", 2, '{"_id": "p2", "text": "", "title": []}'), r"field 'title': .*list"),
    "topic": (
        replace("queries.jsonl", 2, '{"_id": "q2", "text": "how", "metadata": {"topic": 3}}'),
        r"queries\.jsonl, line 2, field 'metadata\.topic': must be a string, not int 3",
    ),
    "metadata": (replace("corpus.jsonl", 2, '{"_id": "p2", "text": "", "metadata": "x"}'), r"field 'metadata'"),
    "owner": (
        replace("corpus.jsonl", 2, '{"_id": "p2", "text": "", "metadata": {"owner": 3}}'),
        r"line 2, field 'metadata\.owner': must be a string, not int 3",
    ),
    "empty query": (replace("queries.jsonl", 2, '{"_id": "q2", "text": " "}'), r"line 2, field 'text': is empty"),
    "surrogate": (replace("corpus.jsonl", 1, '{"_id": "p1", "text": "a\\ud800"}'), r"field 'text': has half a surr"),
    "not UTF-8": (replace("corpus.jsonl", 2, b'{"_id": "p2", "text": "\xff"}'), r"line 2: byte 24 \(0xff\) is not U"),
    "empty corpus": (write("corpus.jsonl", b"\n\n"), r"corpus\.jsonl holds no record"),
    "empty queries": (write("queries.jsonl", b""), r"queries\.jsonl holds no record"),
    "empty qrels": (write("qrels/test.tsv", HEADER.encode()), r"test\.tsv holds no judgement"),
    "no corpus": (lambda folder: (folder / "corpus.jsonl").unlink(), r"corpus\.jsonl is missing"),
    "no queries": (lambda folder: (folder / "queries.jsonl").unlink(), r"queries\.jsonl is missing"),
    "no qrels": (lambda folder: (folder / "qrels").rename(folder / "judgements"), r"qrels has no SPLIT\.tsv"),
    "unknown split": (write("qrels/validation.tsv", b"q1\tp1\t1\n"), r"validation\.tsv names no split that is known"),
    "there twice": (write("corpus.jsonl.gz", gzip.compress(b"{}")), r"corpus\.jsonl is there twice"),
    "split there twice": (write("qrels/test.tsv.gz", gzip.compress(b"a")), r"test\.tsv is there twice"),
    "cut gzip": (as_gzip(lambda data: data[:60]), r"corpus\.jsonl\.gz, after line \d+: the gzip stream is damaged"),
    "altered gzip": (as_gzip(lambda data: data[:30] + b"\xff" * 9 + data[39:]), r"the gzip stream is damaged"),
    "no gzip": (as_gzip(gzip.decompress), r"corpus\.jsonl\.gz, after line 0: the gzip stream is damaged"),
    "empty gzip": (as_gzip(lambda data: b""), r"corpus\.jsonl\.gz holds no record"),
    "too few columns": (replace("qrels/train.tsv", 2, "q1\tp1"), r"train\.tsv, line 2, field 'score': 2 tab-sep"),
    "spaces for tabs": (replace("qrels/train.tsv", 3, "q1 p1 1"), r"train\.tsv, line 3, field 'corpus-id': 1 tab"),
    "too many columns": (replace("qrels/train.tsv", 2, "q1\t0\tp1\t1"), r"train\.tsv, line 2: 4 tab-separated"),
    "float score": (replace("qrels/train.tsv", 2, "q1\tp1\t1.0"), r"train\.tsv, line 2, field 'score': '1\.0' is not"),
    "huge score": (replace("qrels/train.tsv", 2, "q1\tp1\t" + "9" * 5_000), r"field 'score': '9+' is not an integer"),
    "other header": (replace("qrels/train.tsv", 1, "qid\tpid\tgrade"), r"line 1, field 'score': 'grade' .*header"),
    "unknown query": (
        replace("qrels/train.tsv", 2, "q9\tp1\t1"),
        r"line 2, field 'query-id': 'q9' does not occur in q",
    ),
    "unknown passage": (replace("qrels/train.tsv", 2, "q1\tp9\t1"), r"line 2, field 'corpus-id': 'p9' does not occ"),
    "conflict": (replace("qrels/train.tsv", 3, "q1\tp1\t1"), r"train\.tsv, line 3, field 'score': 1 .* had 2"),
    "two splits": (
        replace("qrels/test.tsv", 2, "q1\tp2\t1"),
        r"test\.tsv, line 2, field 'query-id': query 'q1' is already judged in train",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folder_is_refused_by_name(folder: Path, name: str) -> None:
    """Skipping a bad line, or failing with a bare KeyError, leaves the user with wrong figures or no idea where."""
    load_beir(folder)  # guard: well-formed before the change
    change, complaint = MALFORMED[name]
    change(folder)
    with pytest.raises(DataError) as refused:
        load_beir(folder)
    assert re.search(complaint, str(refused.value)), str(refused.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_unreadable_file_is_refused_by_name(folder: Path) -> None:
    """A traceback about a file descriptor does not say which file to open up."""
    (folder / "queries.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"queries\.jsonl cannot be read"):
        load_beir(folder)


def test_not_a_folder_and_unknown_policy(folder: Path) -> None:
    """A file given for a folder, or a misspelt policy, must not fall back to a default."""
    with pytest.raises(DataError, match="is not a folder"):
        load_beir(folder / "corpus.jsonl")
    with pytest.raises(DataError, match="'published' is unknown"):
        load_beir(folder, splits="published")  # type: ignore[arg-type]


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark sets are not at hand")
@pytest.mark.parametrize(
    ("name", "passages", "queries", "owners", "judgements"),
    [
        ("cranfield", 1_400, 225, 1, 1_837),
        ("medquad", 16_350, 11_492, 9, 13_136),
        ("scifact", 5_183, 809, 1, 919),
        ("squad", 2_840, 11_538, 65, 11_551),
    ],
)
def test_real_sets(name: str, passages: int, queries: int, owners: int, judgements: int) -> None:
    """A row dropped from a real set moves its figures away from the published ones."""
    published, again = load_beir(DATA / name, splits="as-published"), load_beir(DATA / name)
    assert (len(published.passages), len(published.queries), len(published.owners)) == (passages, queries, owners)
    assert sum(map(len, published.qrels.values())) == judgements
    assert (again.passages, again.qrels) == (published.passages, published.qrels)
    assert all(again.queries_in(split) for split in ("train", "dev", "test")) and again.notes
