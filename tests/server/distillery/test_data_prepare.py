"""All stages together: what ends in the lessons, what is done once, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tests.hashed_words import HashedWords
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.data import prepare
from stillroom_server.distillery.data.prepare import prepare_lessons
from stillroom_server.distillery.data.settings import DataSettings
from stillroom_server.distillery.lessons import Lessons
from stillroom_shared.errors import DataError, SettingsError

ANIMALS = ["tapir", "zebra", "otter", "lemur", "heron", "gecko", "bison", "okapi"]
PLACES = ["forest", "river", "meadow", "desert", "swamp", "coast", "island", "mountain"]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """64 passages, 32 train and 8 test queries."""
    folder = tmp_path / "zoo"
    (folder / "qrels").mkdir(parents=True)
    pairs = [(animal, place) for animal in ANIMALS for place in PLACES]
    # The longer a passage, the less its common sentence leads back to it.
    passages = [
        {
            "_id": f"{animal}-{place}",
            "title": f"{animal} of the {place}".title(),
            "text": f"The {animal} eats leaves. It sleeps by day in its {place}."
            + " and so on" * ANIMALS.index(animal),
        }
        for animal, place in pairs
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in passages))
    asked = [{"_id": f"q-{a}-{p}", "text": f"what does the {a} of the {p} eat"} for a, p in pairs]
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    for split, some in (("train", pairs[::2]), ("test", pairs[1::8])):
        (folder / "qrels" / f"{split}.tsv").write_text("".join(f"q-{a}-{p}\t{a}-{p}\t1\n" for a, p in some))
    return folder


def settings_of(zoo: Path, **groups: Any) -> DataSettings:
    given = {"sources": [{"kind": "beir", "data": str(zoo), "licence": "CC0"}], "negatives": {"count": 3, "last": 30}}
    return DataSettings.model_validate({**given, **groups})


FULL = {
    "synthetic": {"makers": ["sentence", "title"], "per_passage": 1},
    "roundtrip": {"top": 3},
}


def test_every_stage_leaves_its_mark(zoo: Path, tmp_path: Path) -> None:
    """From a folder to lists: sources by name, made queries that came back, negatives, and facts for the manifest."""
    seen: list[tuple[int, int]] = []
    lessons = prepare_lessons(
        settings_of(zoo, **FULL), tmp_path / "out", teacher=HashedWords(), progress=lambda *at: seen.append(at)
    )
    assert [*lessons.sources] == ["zoo", "queries made by sentence", "queries made by title"]
    facts = lessons.sources["zoo"]
    assert facts["licence"] == "CC0" and facts["splits"] == ["train"] and len(facts["hash"]) == 64
    made = lessons.sources["queries made by sentence"]
    assert made["passages"] == 64 and 0 < made["kept"] < made["made"]
    assert lessons.candidates == 4 and (lessons.grades[:, 0] == 1).all() and not lessons.grades[:, 1:].any()
    assert lessons.lists == 32 + sum(lessons.sources[f"queries made by {one}"]["kept"] for one in ("sentence", "title"))
    texts = lessons.texts(slice(0, len(lessons)))
    for query, row, source in zip(lessons.queries, lessons.passages, lessons.list_sources, strict=True):
        if source == 0:
            animal, place = texts[query].split()[3], texts[query].split()[-2]
            assert texts[row[0]].startswith(f"{animal} of the {place}".title())
        elif source == 2:
            assert texts[row[0]].startswith(texts[query])
    assert lessons.description["about"]["negatives"]["lists"] == lessons.lists
    assert [done for done, _ in seen[:-1]] == sorted(done for done, _ in seen[:-1]) and seen[-1] == (1, 1)


def test_a_made_query_that_does_not_come_back_leaves_no_text(zoo: Path, tmp_path: Path) -> None:
    """Dropped from the lists and still aligned to: the filter would filter nothing."""
    everything = prepare_lessons(settings_of(zoo, **{**FULL, "roundtrip": {}}), tmp_path / "all", teacher=HashedWords())
    filtered = prepare_lessons(settings_of(zoo, **FULL), tmp_path / "some", teacher=HashedWords())
    texts = [set(one.texts(one.rows("query"))) for one in (everything, filtered)]
    assert texts[1] < texts[0]
    named = set(filtered.texts(np.unique(filtered.queries)))
    assert texts[1] == named, "a query without a list is left"
    assert len(filtered.rows("passage")) == len(everything.rows("passage")) == 64


def test_measured_queries_are_found_among_made_ones(zoo: Path, tmp_path: Path) -> None:
    """A generator may well write the very query that a figure is measured on."""
    measured = tmp_path / "measured"
    shutil.copytree(zoo, measured)
    (measured / "queries.jsonl").write_text('{"_id": "q", "text": "tapir OF the forest!"}\n')
    (measured / "qrels" / "train.tsv").unlink()
    (measured / "qrels" / "test.tsv").write_text("q\ttapir-forest\t1\n")
    without = settings_of(zoo, **FULL, exclude={"folders": [str(measured)], "splits": ["test"]})
    lessons = prepare_lessons(without, tmp_path / "out", teacher=HashedWords())
    assert lessons.sources["queries made by title"]["excluded"] == 1
    assert "Tapir Of The Forest" not in lessons.texts(lessons.rows("query"))


def test_made_queries_follow_what_is_excluded_and_who_writes(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of the last run would stay, some of which are measured on by now, or written by a model that is gone."""
    measured, out = tmp_path / "measured", tmp_path / "out"
    shutil.copytree(zoo, measured)
    (measured / "queries.jsonl").write_text('{"_id": "q", "text": "tapir of the forest"}\n')
    for name in ("train", "test"):
        (measured / "qrels" / f"{name}.tsv").unlink()
    (measured / "qrels" / "dev.tsv").write_text("q\ttapir-forest\t1\n")
    (measured / "qrels" / "test.tsv").write_text("q\ttapir-river\t0\n")

    def titles(**changes: Any) -> set[str]:
        shutil.rmtree(out, ignore_errors=True)
        given = {
            "makers": ["title"],
            "per_passage": 1,
            "model": str(tmp_path / "writer"),
            **changes.pop("synthetic", {}),
        }
        made = prepare_lessons(settings_of(zoo, synthetic=given, negatives={"count": 0}, **changes), out, teacher=None)
        return {text for text in made.texts(made.rows("query")) if text.istitle()}

    everything = titles(exclude={"folders": [str(measured)], "splits": ["test"]})
    assert titles(exclude={"folders": [str(measured)], "splits": ["dev"]}) == everything - {"Tapir Of The Forest"}
    asked = Mock(return_value=iter(()))
    monkeypatch.setattr(prepare, "made_queries", asked)
    for said in ("first", "second", "second"):
        (tmp_path / "writer").write_text(said)
        titles()
    assert asked.call_count == 2


def test_what_is_said_of_a_source_can_be_put_right(zoo: Path, tmp_path: Path) -> None:
    """A wrong licence would stay in every release that is made after it was mended."""
    for more in ({}, {"licence": "CC-BY-4.0", "name": "zoo of 2024"}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        sources = [{"kind": "beir", "data": str(zoo), **more}]
        found = prepare_lessons(
            settings_of(zoo, sources=sources, **FULL), tmp_path / "out", teacher=HashedWords()
        ).sources
        name = more.get("name", "zoo")
        assert next(iter(found)) == name and found[name]["licence"] == more.get("licence", "not stated")


def test_nothing_is_done_twice(zoo: Path, tmp_path: Path) -> None:
    """A run that was cut off at the end must not begin at the beginning."""
    settings, teacher = settings_of(zoo, **FULL), HashedWords()
    first = prepare_lessons(settings, tmp_path / "out", teacher=teacher)
    embedded = teacher.texts
    assert prepare_lessons(settings, tmp_path / "out", teacher=teacher).identity == first.identity
    shutil.rmtree(tmp_path / "out")
    again = prepare_lessons(settings, tmp_path / "out", teacher=teacher)
    assert again.identity == first.identity and teacher.texts == embedded
    shutil.rmtree(tmp_path / "out")
    more = settings.model_copy(update={"negatives": settings.negatives.model_copy(update={"count": 5})})
    assert prepare_lessons(more, tmp_path / "out", teacher=teacher).candidates == 6 and teacher.texts == embedded
    fresh = prepare_lessons(settings, tmp_path / "fresh", teacher=HashedWords())
    assert fresh.identity == first.identity, "what was kept is not what would be made"


def test_a_run_cut_off_in_a_source_or_in_mining_goes_on(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a source must never be taken for a whole one."""
    settings = settings_of(zoo, **FULL)
    whole = prepare_lessons(settings, tmp_path / "whole", teacher=HashedWords())

    def broken(*_: Any, **__: Any) -> Any:
        raise InterruptedError

    for name in ("gather", "made_queries", "ranks", "mine"):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(prepare, name, broken)
            prepare_lessons(settings, tmp_path / "out", teacher=HashedWords())
        assert not (tmp_path / "out").exists()
    assert prepare_lessons(settings, tmp_path / "out", teacher=HashedWords()).identity == whole.identity
    assert not list(tmp_path.rglob("*.partial"))


def test_lessons_of_other_settings_text_or_teacher_are_not_taken(zoo: Path, tmp_path: Path) -> None:
    """Yesterday's lessons under today's settings: every figure is of another experiment."""
    settings, out = settings_of(zoo), tmp_path / "out"
    prepare_lessons(settings, out, teacher=HashedWords())
    with pytest.raises(DataError, match="holds lessons of other settings, text or teacher: remove it"):
        prepare_lessons(settings.model_copy(update={"seed": 1}), out, teacher=HashedWords())
    with pytest.raises(DataError, match="other settings"):
        prepare_lessons(settings, out, teacher=HashedWords(identity="another"))
    (zoo / "corpus.jsonl").write_text((zoo / "corpus.jsonl").read_text().replace("leaves", "fruit"))
    with pytest.raises(DataError, match="other settings"):
        prepare_lessons(settings, out, teacher=HashedWords())
    shutil.rmtree(out)
    changed = prepare_lessons(settings, out, teacher=HashedWords())
    assert "fruit" in changed.texts(changed.rows("passage")[:1])[0]


def test_what_needs_a_teacher_says_so(zoo: Path, tmp_path: Path) -> None:
    """A filter that is skipped in silence."""
    with pytest.raises(SettingsError, match=r"data.roundtrip.top asks for a teacher"):
        prepare_lessons(settings_of(zoo, **FULL), tmp_path / "out", teacher=None)
    plain = prepare_lessons(settings_of(zoo), tmp_path / "words", teacher=None)
    assert plain.lists == 32 and plain.candidates == 4
    alone = prepare_lessons(settings_of(zoo, negatives={"count": 0}), tmp_path / "alone", teacher=None)
    assert alone.candidates == 1 and alone.lists == 32


def test_words_find_negatives_beside_the_teacher(zoo: Path, tmp_path: Path) -> None:
    """A setting that is read and forgotten."""
    alone, both = (
        prepare_lessons(
            settings_of(zoo, negatives={"count": 3, "last": 30, "words": words}),
            tmp_path / str(words),
            teacher=HashedWords(),
        )
        for words in (False, True)
    )
    assert (alone.passages[:, 0] == both.passages[:, 0]).all() and (alone.passages != both.passages).any()


def test_passages_alone_make_texts_without_lists(zoo: Path, tmp_path: Path) -> None:
    """Alignment needs no list, and a corpus without queries is no mistake."""
    settings = settings_of(zoo, sources=[{"kind": "beir", "data": str(zoo), "use": "passages"}])
    lessons = prepare_lessons(settings, tmp_path / "out", teacher=HashedWords())
    assert (len(lessons), lessons.lists) == (64, 0)


def test_no_data_at_all(
    tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Lessons from a vocabulary alone: both roles, no lists, the same every time."""
    tiny_towers[0].save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    given = {"sources": [], "datafree": {"queries": 20, "passages": 10, "model": str(tmp_path / "model")}}
    settings = DataSettings.model_validate({**given, "negatives": {"count": 0}})
    lessons = prepare_lessons(settings, tmp_path / "out", teacher=None)
    assert (len(lessons.rows("query")), len(lessons.rows("passage")), lessons.lists) == (20, 10, 0)
    assert lessons.sources["drawn from a vocabulary"]["method"] == "topics"
    assert prepare_lessons(settings, tmp_path / "again", teacher=None).identity == lessons.identity
    assert Lessons.open(tmp_path / "out").identity == lessons.identity
