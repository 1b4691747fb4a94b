"""A small BEIR folder, and what a source of text gives, for the tests of several sources."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from stillroom_server.distillery.data.leakage import Excluded
from stillroom_server.distillery.data.settings import SourceSettings
from stillroom_server.distillery.data.sources import gather
from stillroom_server.distillery.lessons import Lessons

NOTHING = Excluded.of(())
ANIMALS = ("tapir", "zebra", "otter", "lemur", "heron", "gecko", "bison", "okapi")


def beir(folder: Path, qrels: dict[str, list[tuple[str, str, int]]], *, animals: Sequence[str] = ANIMALS) -> Path:
    """A folder with a passage and a query for each animal; the first corpus file is gzipped, as published ones are."""
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": a, "title": a.title(), "text": f"The {a} eats leaves near the river."} for a in animals]
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(one) + "\n" for one in passages)
    queries = [{"_id": f"q-{a}", "text": f"What does the {a} eat?"} for a in animals]
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    for split, rows in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("".join(f"{q}\t{p}\t{s}\n" for q, p, s in rows))
    return folder


def read(settings: SourceSettings, folder: Path, *, without: Excluded = NOTHING, seed: int = 0) -> Lessons:
    return gather(settings, folder, excluded=without, seed=seed)


def queries(lessons: Lessons) -> set[str]:
    return set(lessons.texts(lessons.rows("query")))


def passages(lessons: Lessons) -> set[str]:
    return set(lessons.texts(lessons.rows("passage")))


def judged(lessons: Lessons) -> set[tuple[str, str, int]]:
    pairs = zip(
        lessons.texts(lessons.queries), lessons.texts(lessons.passages[:, 0]), lessons.grades[:, 0], strict=True
    )
    return {(query, passage.partition("\n")[0], int(grade)) for query, passage, grade in pairs}
