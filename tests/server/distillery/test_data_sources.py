"""Sources of public text: what is taken, what stays outside, and that neither order nor size changes it."""

from __future__ import annotations

import json
import os
import random
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.server.distillery.gathering import ANIMALS, NOTHING, beir, judged, passages, queries, read

from stillroom_server.distillery.data import huggingface
from stillroom_server.distillery.data.documentation import headed, sections
from stillroom_server.distillery.data.intake import Intake
from stillroom_server.distillery.data.leakage import excluded
from stillroom_server.distillery.data.sampling import sample
from stillroom_server.distillery.data.settings import DataSettings, ExcludeSettings, SourceSettings
from stillroom_server.distillery.data.sources import source_key
from stillroom_server.distillery.lessons import LessonsWriter
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.settings_file import load


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Five train queries (one with two passages, one judged irrelevant too), one dev and two test queries."""
    train = [(f"q-{a}", a, 1) for a in ANIMALS[:5]] + [("q-tapir", "okapi", 2), ("q-zebra", "otter", 0)]
    return beir(
        tmp_path / "zoo",
        {"train": train, "dev": [("q-gecko", "gecko", 1)], "test": [("q-bison", "bison", 1), ("q-okapi", "okapi", 1)]},
    )


def test_test_queries_are_never_read(zoo: Path, tmp_path: Path) -> None:
    """A test query among the lessons makes every figure on that set worthless."""
    train = read(SourceSettings(kind="beir", data=str(zoo)), tmp_path / "train")
    assert queries(train) == {f"What does the {a} eat?" for a in ANIMALS[:5]}
    both = read(SourceSettings(kind="beir", data=str(zoo), splits=("train", "dev")), tmp_path / "both")
    assert queries(both) - queries(train) == {"What does the gecko eat?"}
    assert len(passages(train)) == len(ANIMALS)
    assert "Tapir\nThe tapir eats leaves near the river." in passages(train)
    with pytest.raises(ValueError, match="test"):
        SourceSettings(kind="beir", data=str(zoo), splits=("test",))
    only_test = beir(tmp_path / "measured", {"test": [("q-tapir", "tapir", 1)]})
    with pytest.raises(DataError, match=r"has no train judgements.*never learned from, set use to passages"):
        read(SourceSettings(kind="beir", data=str(only_test)), tmp_path / "refused")
    alone = read(SourceSettings(kind="beir", data=str(only_test), use="passages"), tmp_path / "alone")
    assert not queries(alone) and len(passages(alone)) == len(ANIMALS)


def test_grades_and_several_passages_survive(zoo: Path, tmp_path: Path) -> None:
    """A grade lost makes a passage judged irrelevant a positive."""
    lessons = read(SourceSettings(kind="beir", data=str(zoo)), tmp_path / "out")
    expected = {(f"What does the {a} eat?", a.title(), 1) for a in ANIMALS[:5]}
    expected |= {("What does the tapir eat?", "Okapi", 2), ("What does the zebra eat?", "Otter", 0)}
    assert judged(lessons) == expected
    facts = lessons.description["about"]
    assert facts["splits"] == ["train"] and facts["texts"] == 13 and facts["lists"] == 7 and not facts["left_out"]


def test_limits_keep_the_passages_that_chosen_queries_need(zoo: Path, tmp_path: Path) -> None:
    """A query whose passage was sampled away has nothing to be taught."""
    lessons = read(SourceSettings(kind="beir", data=str(zoo), queries=2, passages=1), tmp_path / "out")
    assert len(queries(lessons)) == 2
    needed = {passage for _, passage, _ in judged(lessons)}
    assert len(passages(lessons)) == len(needed) + 1


def test_a_sample_depends_on_content_and_seed_alone() -> None:
    """A shuffled or re-sharded data set would give other lessons, and a larger one would throw away the first."""
    words = [f"word {number}" for number in range(2_000)]

    def chosen(stream: Sequence[str], limit: int, seed: int = 0) -> set[str]:
        return set(sample(stream, {"": limit}, key=lambda text: ("", text), seed=seed))

    few = chosen(words, 100)
    assert len(few) == 100 and few == chosen(random.Random(1).sample(words, len(words)), 100)
    assert few < chosen(words, 300) and few != chosen(words, 100, seed=1)
    assert few == chosen([*words, *words], 100), "a text that occurs twice is not twice as likely"
    # No bias by place: the mean place of 300 uniform ones is 1,000 with a standard error of 33.
    assert abs(sum(int(w.split()[1]) for w in chosen(words, 300)) / 300 - 1_000) < 4 * 33


def test_a_stream_is_sampled_in_bounded_memory() -> None:
    """A sample that holds its candidates in memory is no use on a data set that is larger than that."""

    def stream() -> Iterator[str]:
        yield from (f"{number} " + "x" * 10_000 for number in range(3_000))

    tracemalloc.start()
    assert sum(1 for _ in sample(stream(), {"": 1_000}, key=lambda text: ("", text), seed=0)) == 1_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000, f"{peak:,} bytes for 1,000 texts of 10,000: they were held"


def test_what_is_measured_is_left_out_and_counted(zoo: Path, tmp_path: Path) -> None:
    """A test query that also occurs in the training data inflates the figure, and nobody would see it."""
    measured = beir(tmp_path / "measured", {"train": [("q-lemur", "lemur", 1)], "test": [("q-tapir", "tapir", 1)]})
    queries_file = measured / "queries.jsonl"
    queries_file.write_text(queries_file.read_text().replace("What does the tapir eat?", "what DOES the tapir,  eat"))
    settings = SourceSettings(kind="beir", data=str(zoo))
    without = excluded(ExcludeSettings(folders=(measured,), splits=("test",)))
    lessons = read(settings, tmp_path / "out", without=without)
    assert queries(lessons) == {f"What does the {a} eat?" for a in ANIMALS[1:5]}
    assert lessons.description["about"]["left_out"] == {"excluded_queries": 1}
    assert len(passages(lessons)) == len(ANIMALS)
    with pytest.raises(DataError, match="gives no text"):
        everything = excluded(ExcludeSettings(folders=(measured,), splits=("test",), passages=True))
        read(settings.model_copy(update={"use": "passages"}), tmp_path / "none", without=everything)
    with pytest.raises(DataError, match=r"has no dev judgements, only train, test"):
        excluded(ExcludeSettings(folders=(measured,), splits=("dev",)))


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_a_local_data_set_is_streamed(tmp_path: Path) -> None:
    """The tests' way into Hugging Face data sets: columns, lists of passages with titles, further passages, empty rows."""
    folder = tmp_path / "set"
    parquet(
        folder / "train.parquet",
        {
            "ask": ["what do tapirs eat", "what do zebras eat", None, "  "],
            "body": [["Leaves.", "Fruit."], ["Grass."], ["Nothing is asked about it."], []],
            "head": [["Tapirs", ""], ["Zebras"], [None], []],
            "bad": [["Stones."], [], [], []],
        },
    )
    parquet(folder / "test.parquet", {"ask": ["a test query"], "body": [["x"]], "head": [["y"]], "bad": [[]]})
    settings = SourceSettings(
        kind="huggingface", data=str(folder), query_column="ask", passage_column="body", title_column="head", other_column="bad"
    )  # fmt: skip
    lessons = read(settings, tmp_path / "out")
    assert queries(lessons) == {"what do tapirs eat", "what do zebras eat"}
    assert passages(lessons) == {"Tapirs\nLeaves.", "Fruit.", "Zebras\nGrass.", "Nothing is asked about it.", "Stones."}
    assert len(judged(lessons)) == 3
    facts = lessons.description["about"]
    assert len(facts["files"]) == 64 and facts["split"] == "train"
    for split in ("test[:10]", "train+test", "train[:9]+ test[:1]", "all"):
        with pytest.raises(ValueError, match="test queries are never learned from"):
            SourceSettings(kind="huggingface", data=str(folder), split=split)
    few = [settings.model_copy(update={"queries": 1, "passages": most}) for most in (None, 1, 0)]
    found = [read(one, tmp_path / f"few-{number}") for number, one in enumerate(few)]
    assert [len(queries(one)) for one in found] == [1, 1, 1], (
        "a corpus is no smaller because fewer queries are asked of it"
    )
    assert passages(found[0]) == passages(lessons)
    needed = {text for _, text, _ in judged(found[2])}
    assert len(passages(found[1])) == len(passages(found[2])) + 1 and needed


@pytest.mark.parametrize(
    ("columns", "change", "refusal"),
    [
        ({"query": ["a"], "text": ["b"]}, {}, r"no column 'passage': its columns are query, text"),
        ({"query": ["a b"], "passage": [3]}, {}, r"row 0, column 'passage': '3' is a int, not text"),
        ({"query": ["a"], "passage": ["b"]}, {"split": "validation"}, r"cannot be read \(ValueError"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused_with_its_row_or_column(
    tmp_path: Path, columns: dict[str, list[object]], change: dict[str, str], refusal: str
) -> None:
    """A wrong column that is read as text becomes thousands of lessons about numbers."""
    data = parquet(tmp_path / "set" / "train.parquet", columns).parent
    with pytest.raises(DataError, match=refusal):
        read(SourceSettings.model_validate({"kind": "huggingface", "data": str(data), **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_data_set_on_the_hub_is_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set that changes between two runs changes the release, and its manifest would not say so."""
    with pytest.raises(DataError, match=r"cannot be looked up on the hub.*or give a folder"):
        read(SourceSettings(kind="huggingface", data="nobody/nothing"), tmp_path / "offline")
    local = parquet(tmp_path / "train.parquet", {"query": ["a b"], "passage": ["c"]})
    asked: dict[str, object] = {}
    monkeypatch.setattr(huggingface, "_on_the_hub", lambda settings: ("c0ffee", "cc-by-4.0"))

    def loads(place: str, *, split: str, streaming: bool, **arguments: object) -> object:
        asked.update(arguments, place=place)
        return datasets.load_dataset("parquet", data_files=str(local), split=split, streaming=streaming)

    monkeypatch.setattr(huggingface, "load_dataset", loads)
    facts = read(SourceSettings(kind="huggingface", data="zoo/animals"), tmp_path / "out").description["about"]
    assert asked == {"place": "zoo/animals", "revision": "c0ffee"}
    assert (facts["revision"], facts["licence"]) == ("c0ffee", "cc-by-4.0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with docstrings, a long help text, and a Markdown file."""
    root = tmp_path / "site" / "tapir_docs"
    body = " ".join(["The tapir walks through the forest at night and eats many leaves there."] * 4)
    root.mkdir(parents=True)
    (root / "__init__.py").write_text(
        f'"""Feed the tapirs at night.\n\n{body} Docstring.\n"""\nHELP = "{body} Literal."\nraise SystemExit\n'
    )
    (root / "GUIDE.md").write_text(f"# Rivers\n\n{body} Guide.\n\n```\n# no heading\n```\n")
    (root / "LICENSE.txt").write_text(f"{body} Licence.")
    (root / "tests").mkdir()
    (root / "tests" / "notes.md").write_text(f"# Notes\n{body} Notes.")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_documentation_is_what_named_packages_ship_beside_docstrings(package: Path) -> None:
    """A docstring twice, a licence or a test fixture among the passages is learned as if it were documentation."""
    found = list(sections(["tapir_docs"]))
    assert [text.split()[-1] for text in sorted(found, key=lambda text: text.startswith("Rivers"))] == [
        "Literal.",
        "```",
    ]
    assert any(text.startswith("Rivers\nThe tapir walks") for text in found)
    assert "tapir_docs" not in sys.modules
    assert next(headed("Title\n=====\nText below.\n")) == ("Title", "Text below.\n")
    with pytest.raises(DataError, match="'tapir_nowhere' of the docstring corpus is not installed"):
        list(sections(["tapir_nowhere"]))


def test_an_added_package_changes_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that grows with the environment gives another model on every machine."""
    monkeypatch.setattr(
        "importlib.metadata.packages_distributions", lambda: {"tapir_docs": ["stillroom"], "zebra_docs": ["stillroom"]}
    )
    settings = SourceSettings(kind="documentation", use="passages", packages=("tapir_docs",))
    before, key = read(settings, tmp_path / "before"), source_key(settings)
    (package.parent / "zebra_docs").mkdir()
    (package.parent / "zebra_docs" / "__init__.py").write_text((package / "__init__.py").read_text())
    assert read(settings, tmp_path / "after").identity == before.identity and source_key(settings) == key


def test_docstrings_obey_splits(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public dev queries are what a recipe is tuned on: learned from, they say nothing."""
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"tapir_docs": ["numpy"]})
    for number in range(12):
        (package / f"m{number}.py").write_text(
            (package / "__init__.py")
            .read_text()
            .replace("at night.", f"at {number} o'clock.", 1)
            .replace("walks", f"w{number}")
        )
    both = [
        read(SourceSettings(packages=("tapir_docs",), splits=splits), tmp_path / splits[0])
        for splits in (("train",), ("dev",))
    ]
    assert all(len(passages(one)) == 13 for one in both)
    assert queries(both[0]) and not queries(both[0]) & queries(both[1]) and len(queries(both[0])) < 13


def test_a_source_is_what_its_files_say_not_when_they_were_written(zoo: Path) -> None:
    """Data that were fetched again would make days of training stale; an edit within a second, of equal length, would not."""
    settings = SourceSettings(kind="beir", data=str(zoo))
    key, file = source_key(settings), zoo / "queries.jsonl"
    before = file.stat()
    file.write_text(file.read_text())
    os.utime(file, ns=(0, 0))
    assert source_key(settings) == key
    file.write_text(file.read_text().replace("tapir", "okapi"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and source_key(settings) != key


def test_odd_texts_stay_outside_and_are_counted(tmp_path: Path) -> None:
    """Half a surrogate pair would stop the writer after an hour; a book of a megabyte is no passage."""
    rows = [{"query": "a", "passage": "b"}, {"query": " ", "passage": " "}, {"query": "long", "passage": "word " * 50}]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lessons = read(SourceSettings(kind="huggingface", data=str(path), characters=100), tmp_path / "out")
    assert lessons.description["about"]["left_out"] == {"cut": 1}
    assert passages(lessons) == {"b", ("word " * 19).strip()}
    with LessonsWriter(tmp_path / "more", candidates=1) as writer:
        intake = Intake(writer, NOTHING, name="zoo", characters=100)
        intake.pair(intake.query("half a \ud800 pair"), intake.passage("whole"))
        assert intake.passage(" \n") is None
    assert intake.counts == {"unreadable": 1, "judgements_left_out": 1, "blank": 1}


def test_settings_are_read_from_tables_of_sources(tmp_path: Path) -> None:
    """A recipe whose second source is silently dropped trains on the first alone."""
    path = tmp_path / "data.toml"
    path.write_text(
        '[[sources]]\nkind = "beir"\ndata = "zoo"\n[[sources]]\nkind = "docstrings"\n[negatives]\ncount = 3\n'
    )
    settings = load(DataSettings(), path, {"seed": "4", "synthetic.makers": "crop,title"})
    assert [one.title for one in settings.sources] == ["zoo", "docstrings"]
    assert (settings.negatives.count, settings.seed, settings.synthetic.makers) == (3, 4, ("crop", "title"))
    for text, refusal in (
        ('[[sources]]\nkind = "beir"\n', "needs `data`"),
        ("[[sources]]\n[[sources]]\n", "docstrings occur twice"),
        ("[negatives]\ncount = 200\n", "do not fit between candidates 0 and 100"),
        ('[synthetic]\nmakers = ["llm"]\n', "need `model`"),
        ("sources = []\n", "no sources and no text from a vocabulary"),
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match=refusal):
            load(DataSettings(), path, {})
