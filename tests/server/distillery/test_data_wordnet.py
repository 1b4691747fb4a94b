"""WordNet as a source: its definitions, and questions about its words, from files of the released format alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.server.distillery.gathering import passages, queries, read

from stillroom_server.distillery.data.questions import read_words
from stillroom_server.distillery.data.settings import SourceSettings
from stillroom_shared.errors import DataError

LICENSED = "  1 This software is being provided to you  \n  2 WordNet 3.1 Copyright 2011 by Princeton University.  \n"


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """Files of the released format: the licence, then an entry for each set, counts of words in hexadecimal."""
    folder = tmp_path / "dict"
    folder.mkdir()
    many = " ".join(f"name_{i} 0" for i in range(11))
    entries = {
        "noun": f'00001740 03 n 0b {many} 001 ~ 00001930 n 0000 | eleven names; "as in this"  \n',
        "verb": "00001741 29 v 01 eat 0 001 @ 00001930 v 0000 01 + 08 00 | take in solid food  \n",
        "adj": "00001742 00 s 02 belly-up(p) 0 done_for(a) 0 000 | financially ruined  \n",
        "adv": "00001743 02 r 01 slowly 0 000 | without speed  \n",
    }
    for part, entry in entries.items():
        (folder / f"data.{part}").write_text(LICENSED + entry)
    return folder


def test_wordnet_gives_each_set_of_synonyms_with_its_definition(wordnet: Path, tmp_path: Path) -> None:
    """A count read as decimal would take pointers for words; the licence must not become a text."""
    found = read(SourceSettings(kind="wordnet", data=str(wordnet), use="queries"), tmp_path / "out")
    names = ", ".join(f"name {i}" for i in range(11))
    assert queries(found) == {
        f'{names}: eleven names; "as in this"',
        "eat: take in solid food",
        "belly-up, done for: financially ruined",
        "slowly: without speed",
    }
    assert not passages(found)
    about = found.description["about"]
    assert about["release"] == "WordNet 3.1"
    assert "Princeton" in about["licence"]


def test_wordnet_that_is_not_there_or_not_whole_is_refused(wordnet: Path, tmp_path: Path) -> None:
    """Three of four files would give a dictionary without verbs, and nobody would know."""
    source = SourceSettings(kind="wordnet", data=str(wordnet), use="queries")
    (wordnet / "data.adv").write_text("00001743 02 r xx slowly\n")
    with pytest.raises(DataError, match=r"data\.adv:1: not an entry"):
        read(source, tmp_path / "malformed")
    (wordnet / "data.verb").unlink()
    with pytest.raises(DataError, match=r"no data\.verb: install WordNet"):
        read(source, tmp_path / "missing")
    with pytest.raises(ValueError, match="set use to queries"):
        SourceSettings(kind="wordnet")


def indexed(folder: Path) -> Path:
    """The three indexes of words, with pointers of varying number before the counts that are read."""
    entries = {
        "noun": [
            "breakbone_fever n 1 1 @ 1 0 00001740",
            "use n 2 3 @ ~ + 2 7 00001740 00001741",
            "ax n 1 0 1 2 00001740",
        ],
        "verb": ["feed v 1 2 @ ~ 1 1 00001741", "give_up v 1 1 @ 1 1 00001741"],
        "adj": ["shy a 1 1 & 1 1 00001742"],
    }
    for part, lines in entries.items():
        (folder / f"index.{part}").write_text(LICENSED + "\n".join(lines) + "\n")
    return folder


def test_questions_put_words_of_the_dictionary_into_frames(wordnet: Path, tmp_path: Path) -> None:
    """Counts read from the wrong field would make attributes of words that nobody uses; two runs must make the same."""
    indexed(wordnet)
    words = read_words(wordnet)
    assert words.things == ["breakbone fever", "use", "ax"] and words.acts == ["feed"] and words.qualities == ["shy"]
    (wordnet / "index.noun").write_text((wordnet / "index.noun").read_text() + "cause n 1 1 @ 1 3 00001740\n")
    assert read_words(wordnet).attributes == ["cause"]  # used, a single word, longer than three letters
    source = SourceSettings(kind="questions", data=str(wordnet), use="queries", queries=20)
    found, again = (queries(read(source, tmp_path / name)) for name in ("one", "two"))
    assert found == again and len(found) == 20
    assert all(re.search("breakbone fever|use|ax|cause", text) for text in found)
    assert {text.split()[0].lower() for text in found} >= {"what", "how", "is", "where", "why"}
    other = queries(read(source, tmp_path / "three", seed=1))
    assert other != found


def test_questions_without_words_or_number_are_refused(wordnet: Path, tmp_path: Path) -> None:
    """An endless stream, or frames with nothing in them."""
    with pytest.raises(ValueError, match="queries to how many"):
        SourceSettings(kind="questions", use="queries")
    source = SourceSettings(kind="questions", data=str(wordnet), use="queries", queries=20)
    with pytest.raises(DataError, match=r"no index\.noun: install WordNet"):
        read(source, tmp_path / "missing")
    (indexed(wordnet) / "index.verb").write_text("feed v one\n")
    with pytest.raises(DataError, match=r"index\.verb:1: not an entry"):
        read(source, tmp_path / "malformed")
