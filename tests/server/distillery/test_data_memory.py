"""Preparing lessons holds no object for each text; what lies on disk instead changes nothing and outlives nothing."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.killing import KILLED
from tests.references import lessons as reference

from stillroom_server.distillery.data import leakage
from stillroom_server.distillery.data.intake import Intake
from stillroom_server.distillery.data.leakage import Excluded
from stillroom_server.distillery.data.sampling import Lowest
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.training.batches import like_lengths
from stillroom_shared import first_seen
from stillroom_shared.beir import read_lines
from stillroom_shared.errors import DataError
from stillroom_shared.first_seen import FirstSeen


@pytest.fixture
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ten pages of a table in memory, so that it is read back from disk."""
    monkeypatch.setattr(first_seen, "_PRAGMAS", (*first_seen._PRAGMAS, "cache_size = 10"))


@pytest.mark.usefixtures("few_pages")
def test_keys_are_found_as_in_a_dictionary() -> None:
    """A key that is lost when its page is written gives a text two rows; one that is confused gives it another's."""
    draw = random.Random(0)
    short = [draw.randbytes(draw.randrange(3)) for _ in range(2_000)]  # 66,000 at most: many repeat; some are empty
    long = [draw.randbytes(16) for _ in range(8_000)]
    alike = [long[0][:place] + bytes([place]) + long[0][place + 1 :] for place in range(16)]
    keys = [*short, *long, *alike, *draw.sample(long, 4_000), *draw.sample(short, 1_000)]
    known: dict[bytes, int] = {}
    with FirstSeen() as seen:
        numbers = [seen.setdefault(key, number) for number, key in enumerate(keys)]
        pages = seen._db.execute("PRAGMA page_count").fetchone()[0]
    assert numbers == [known.setdefault(key, number) for number, key in enumerate(keys)]
    assert len(known) < len(keys) and pages > 50, "the table must outgrow what is in memory"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the library that keeps the table tells nobody what to do."""
    monkeypatch.setattr(first_seen, "_PRAGMAS", (*first_seen._PRAGMAS, "max_page_count = 20"))
    with (
        pytest.raises(DataError, match=r"full.*free some space"),
        LessonsWriter(tmp_path / "out", candidates=1) as writer,
    ):
        writer.texts((f"Entry {number}." for number in range(10_000)), "passage", writer.source("zoo"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_pages")
def test_lessons_are_those_of_a_writer_that_holds_everything(tmp_path: Path) -> None:
    """Lessons of another identity are prepared, embedded and learned from all over again."""
    draw = random.Random(1)
    texts = [(f"Entry {draw.randrange(4_000)}.", draw.choice(("query", "passage"))) for _ in range(6_000)]
    kinds = {role: [place for place, one in enumerate(texts) if one[1] == role] for role in ("query", "passage")}
    pairs = [(draw.choice(kinds["query"][:200]), draw.choice(kinds["passage"][:50])) for _ in range(5_000)]
    rows, kept, identity = reference.identity(texts, pairs)
    with LessonsWriter(tmp_path / "out", candidates=1) as writer:
        source = writer.source("zoo")
        assert [writer.text(text, role, source) for text, role in texts] == rows  # type: ignore[arg-type]
        for query, passage in pairs:
            writer.list(rows[query], [rows[passage]], [1], source, once=True)
    made = Lessons.open(tmp_path / "out")
    assert made.identity == identity and made.texts(rows) == [text for text, _ in texts]
    assert np.column_stack([made.queries, made.passages]).tolist() == [
        [rows[q], rows[p]] for q, p in (pairs[i] for i in kept)
    ]
    assert 1_000 < made.lists < 5_000 and len(made) < 6_000
    assert sorted(path.name for path in made.folder.iterdir()) == ["lessons.json", "lists.arrow", "texts.arrow"]


def test_lists_are_repeated_unless_they_are_to_be_there_once(tmp_path: Path) -> None:
    """Two sources that judge a pair both count; a source that says it twice does not."""
    with LessonsWriter(tmp_path / "out", candidates=2) as writer:
        source = writer.source("zoo")
        query, *rows = (writer.text(text, "passage", source) for text in "abc")
        for passages, once in ((rows, True), (rows, True), (rows[::-1], True), (rows, False), (rows, True)):
            writer.list(query, passages, [1, 0], source, once=once)
    assert Lessons.open(tmp_path / "out").passages.tolist() == [rows, rows[::-1], rows]


KILLED_OFTEN = """
import os, sys
from pathlib import Path
from tests.killing import kill_at_line
from stillroom_server.distillery import lessons
from stillroom_shared import first_seen

for line in range(3, 2_500, 97):
    if os.fork() == 0:
        kill_at_line(line, [lessons.__file__, first_seen.__file__])
        with lessons.LessonsWriter(Path(sys.argv[1], "out"), candidates=1) as writer:
            source = writer.source("zoo")
            writer.texts((str(number) for number in range(1_000)), "passage", source)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_killed_writer_leaves_nothing_that_the_next_one_trusts(tmp_path: Path) -> None:
    """Half a table of texts beside whole lessons would give texts the rows of others."""
    command = [sys.executable, "-c", KILLED_OFTEN, str(tmp_path)]
    deaths = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(deaths) == 26 and set(deaths) == {str(KILLED)}
    left = list(tmp_path.iterdir())
    assert any((one / "texts.arrow").exists() for one in left) and all(one.suffix == ".partial" for one in left)
    texts = [(str(number), "passage") for number in range(500)]
    with LessonsWriter(tmp_path / "out", candidates=1) as writer:
        rows = writer.texts((text for text, _ in texts), "passage", writer.source("zoo"))
    assert (rows, [], Lessons.open(tmp_path / "out").identity) == reference.identity(texts, [])


def held(count: int, folder: Path) -> int:
    """The largest memory of Python's objects while so many judged pairs are read and taken in, in bytes."""
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(f'{{"_id": "{number}", "text": "Entry {number}."}}\n' for number in range(count)))
    tracemalloc.start()
    with LessonsWriter(folder / "out", candidates=1) as writer:
        intake = Intake(writer, Excluded.of(()), name="zoo", characters=100)
        for line in read_lines(corpus, owner="", public=True):
            intake.pair(intake.query(f"what is {line.number}"), intake.passage(line.passage.text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_taking_in_texts_holds_no_object_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million texts must not need a larger machine than ten thousand."""
    monkeypatch.setattr("stillroom_server.distillery.lessons._BATCH", 256)
    more = held(6_000, tmp_path / "many") - held(2_000, tmp_path / "few")
    assert more < 4_000 * 25, f"{more / 4_000:.0f} bytes for each further pair: a number alone takes 32"


def test_the_lowest_numbers_are_those_of_a_sorted_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is forgotten takes its text out of the sample."""
    monkeypatch.setattr("stillroom_server.distillery.data.sampling._SLACK", 3)
    draw = random.Random(0)
    for limit, most in ((0, 9), (1, 9), (7, 5), (7, 40), (50, 300), (50, 2**64 - 1)):
        offered = [draw.randint(0, most) for _ in range(500)]
        lowest = Lowest(limit)
        taken = [number for number in offered if lowest.offer(number)]
        expected = set(sorted(set(offered))[:limit])
        assert {number for number in offered if number in lowest} == expected <= {*taken}
    assert len(taken) < 50 * (2 + np.log2(500 / 50)) + 4 * 50**0.5, "of a stream only few must wait"


def test_excluded_hashes_are_compared_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a hash would leave out texts that nobody measures on; a search that is off by one lets some of them in."""
    monkeypatch.setattr(leakage, "leak_key", lambda text: bytes.fromhex(text))
    draw = random.Random(0)
    texts = [f"{draw.randrange(4):016x}{draw.randrange(60):016x}" for _ in range(200)]
    found = Excluded.of([*texts[:100], ""])
    assert [text in found for text in texts] == [text in {*texts[:100]} for text in texts]
    assert "" not in found and len(found.high) == len({*texts[:100]}) and not all(text in found for text in texts)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (1, 4), (31, 1), (128, 4), (129, 4), (1_000, 7), (5, 8)])
def test_batches_are_those_of_lists(count: int, batch_size: int) -> None:
    """A run that goes on after an upgrade would learn some texts twice and others never."""
    lengths: Sequence[int] = np.random.default_rng(5).integers(1, 20, count).tolist()
    found = list(like_lengths(np.array(lengths, np.int32), batch_size, np.random.default_rng(3)))
    assert found == reference.like_lengths(lengths, batch_size, 3)
