"""Everything that students learn from, made in stages that are kept: sources, made queries, the filter, negatives.

    OUT.work/sources/     each source as it was read                 `sources`
    OUT.work/gathered-*   all sources together, judged pairs
    OUT.work/queries/     made queries, piece by piece               `synthetic`
    OUT.work/made-*       the same with the made queries
    OUT.work/vectors/     the teacher's vectors of these             `vectors`, and the cache of vectors where none is given
    OUT.work/ranked/      its best passages for each query           `candidates`, `roundtrip`, `negatives`
    OUT                   the lessons, whole

A run that was cut off goes on where it was; changed settings do again what depends on them. What lies in OUT.work is public
text and may be deleted when OUT is there. Memory: some blocks of text and vectors, and numbers in arrays, some 110 bytes for a
passage and its query while judgements are sorted; what was seen before is looked up on disk (`first_seen`). The exceptions are
ids of judgements in a BEIR folder, and the source `docstrings`, whose corpus is read whole.

| case | what happens |
|---|---|
| OUT holds lessons of the same settings, sources and teacher | they are returned |
| OUT holds others | refused: nothing is overwritten |
| negatives, and no teacher | passages that share words with the query |
| a filter, and no teacher | refused |
| no judged query at all | texts without lists, as alignment needs |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stillroom_server.distillery.data import datafree
from stillroom_server.distillery.data.candidates import Dense, Finder, Judged, Lexical, Mixed
from stillroom_server.distillery.data.leakage import Excluded, excluded
from stillroom_server.distillery.data.merging import (
    SYNTHETIC,
    add,
    leads_on,
    pairs_of,
    same_sources,
    shares,
    synthetic_sources,
)
from stillroom_server.distillery.data.negatives import Mined, mine
from stillroom_server.distillery.data.roundtrip import ranks
from stillroom_server.distillery.data.settings import DataSettings
from stillroom_server.distillery.data.sources import content_of, gather, source_key
from stillroom_server.distillery.data.synthetic import chosen_passages, made_queries, maker
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.teachers.base import Embedder, Teacher
from stillroom_server.distillery.vectors import VectorCache
from stillroom_server.teacher import OFFLINE
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.workspace import key_of

Progress = Callable[[int, int], None]
_STEPS = 1_000


def prepare_lessons(
    settings: DataSettings,
    out: Path,
    *,
    teacher: Teacher | None,
    cache: VectorCache | None = None,
    progress: Progress = lambda done, total: None,
) -> Lessons:
    """Lessons at `out`, made or as they are.

    Args:
        teacher: who filters queries and mines negatives; with vectors (`Embedder`) over all passages.
        cache: its vectors by content: what is in it is not embedded again, here or by whoever reads it later.
        progress: (done, total) over all stages, each of which counts the same.

    Raises:
        DataError: a source is malformed or empty, or `out` holds other lessons.
        SettingsError: a model cannot be had, or the settings ask for a teacher that is not there.
    """
    if settings.roundtrip.top is not None and settings.synthetic.makers and teacher is None:
        raise SettingsError("data.roundtrip.top asks for a teacher, and there is none: name one, or set it to none")
    work = _Preparation(settings, out, teacher, cache, progress)
    if out.exists():
        lessons = Lessons.open(out)
        if lessons.description.get("about", {}).get("key") != work.key:
            raise DataError(
                f"{out} holds lessons of other settings, text or teacher: remove it, or name another folder"
            )
        return lessons
    return work.finished()


@dataclass(frozen=True, eq=False)
class _Preparation:
    settings: DataSettings
    out: Path
    teacher: Teacher | None
    cache: VectorCache | None
    progress: Progress
    finders: dict[str, Finder] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Changes with all that the lessons depend on."""
        teacher = self.teacher.identity if self.teacher and self._asks else None
        return key_of(self.settings.model_dump(mode="json"), self._content, self._excluding, self._writers, teacher)

    @property
    def _asks(self) -> bool:
        """Whether anything depends on the teacher."""
        return bool(self.settings.negatives.count or (self.settings.roundtrip.top and self.settings.synthetic.makers))

    @cached_property
    def _content(self) -> list[str]:
        """Of each source."""
        return [source_key(source) for source in self.settings.sources]

    @cached_property
    def _excluding(self) -> list[Any]:
        """What must not be learned from: how it is named, and what it is now."""
        exclude = self.settings.exclude
        return [exclude.model_dump(mode="json"), [content_of(str(folder)) for folder in exclude.folders]]

    @cached_property
    def _writers(self) -> list[str]:
        """Models that make text."""
        models = self.settings.synthetic.model, self.settings.datafree.model
        return [content_of(model) for model in models if model not in ("", OFFLINE)]

    @cached_property
    def _work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")

    @cached_property
    def _excluded(self) -> Excluded:
        return excluded(self.settings.exclude)

    def finished(self) -> Lessons:
        """All stages, one after the other."""
        if not self.settings.sources:
            return self._written(None, None)
        made = self._made(self._gathered())
        kept = self._kept(made)
        return self._written(made, kept)

    def _gathered(self) -> Lessons:
        """All sources together."""
        settings, parts = self.settings, []
        for number, (source, content) in enumerate(zip(settings.sources, self._content, strict=True)):
            key = key_of(source.model_dump(mode="json"), content, self._excluding, settings.seed)
            folder = self._work / "sources" / f"{re.sub('[^A-Za-z0-9]+', '-', source.title)}-{key}"
            share = self._step(0, number, len(settings.sources))
            parts.append(
                Lessons.open(folder)
                if folder.exists()
                else gather(source, folder, excluded=self._excluded, seed=settings.seed, progress=share)
            )
        facts = [{**part.description["about"], "hash": part.identity} for part in parts]
        # What is said of a source goes with its text: a licence that was put right must not stay as it was.
        folder = self._work / f"gathered-{key_of([source.title for source in settings.sources], facts)}"
        if not folder.exists():
            with LessonsWriter(folder, candidates=1) as writer:
                for source, part, about in zip(settings.sources, parts, facts, strict=True):
                    add(writer, part, {0: writer.source(source.title, **about)})
        return Lessons.open(folder)

    def _made(self, gathered: Lessons) -> Lessons:
        """The gathered lessons with the made queries; each maker is a source."""
        settings = self.settings.synthetic
        if not settings.makers:
            return gathered
        said = [settings.model_dump(mode="json"), self._excluding, self._writers, self.settings.seed]
        folder = self._work / f"made-{key_of(gathered.identity, gathered.sources, said)}"
        if folder.exists():
            return Lessons.open(folder)
        about: dict[str, Any] = {}
        rows = chosen_passages(gathered, settings.passages, seed=self.settings.seed)
        with LessonsWriter(folder, candidates=1, about=about) as writer:
            add(writer, gathered, same_sources(writer, gathered))
            for number, kind in enumerate(settings.makers):
                one = maker(kind, settings, seed=self.settings.seed)
                name, left_out, count = f"queries made by {kind}", 0, 0
                facts = {"model": settings.model} if kind in ("seq2seq", "llm") else {}
                source = writer.source(name, kind=SYNTHETIC, maker=kind, per_passage=settings.per_passage, **facts)
                share = self._step(1, number, len(settings.makers))
                pieces = made_queries(one, gathered, rows, settings, self._work / "queries", progress=share)
                for passage, query in pieces:
                    if query in self._excluded:
                        left_out += 1
                        continue
                    writer.list(writer.text(query, "query", source), [passage], [1], source)
                    count += 1
                about[name] = {"passages": len(rows), "made": count, "excluded": left_out}
        return Lessons.open(folder)

    def _kept(self, made: Lessons) -> Judged:
        """The judgements that are learned from: those of sources, and those of made queries that come back."""
        judged = Judged.of(made)
        of_makers = np.isin(judged.sources, synthetic_sources(made))
        if self.settings.roundtrip.top is None or not of_makers.any() or self.teacher is None:
            return judged
        found = ranks(
            self.teacher, self._finder(made), made, judged.keep(of_makers), self.settings.roundtrip,
            self._work / "ranked", progress=self._step(3, 0, 1),
        )  # fmt: skip
        back = ~of_makers
        back[of_makers] = found <= self.settings.roundtrip.top
        return judged.keep(back)

    def _finder(self, made: Lessons) -> Finder:
        """Search over the passages, prepared once for filter and negatives."""
        if made.identity not in self.finders:
            share = self._step(2, 0, 1)
            folder = self._work / "vectors"
            self.finders[made.identity] = (
                Dense.prepare(self.teacher, made, folder, self.cache or VectorCache(folder), share)
                if isinstance(self.teacher, Embedder)
                else Lexical(made, self._work / "words", progress=share)
            )
        return self.finders[made.identity]

    def _written(self, made: Lessons | None, kept: Judged | None) -> Lessons:
        """The lessons at `out`: texts without the made queries that were dropped, lists with negatives, texts from nothing."""
        count = self.settings.negatives.count
        about: dict[str, Any] = {"key": self.key, "settings": self.settings.model_dump(mode="json")}
        with LessonsWriter(self.out, candidates=1 + count, about=about) as writer:
            if made is not None and kept is not None:
                numbers = same_sources(writer, made, **shares(made, kept))
                rows = add(writer, made, numbers, lists=False, keep=leads_on(made, kept))
                counts: Counter[str] = Counter()
                for one, source in self._lists(made, kept, counts):
                    writer.list(int(rows[one.query]), rows[one.passages].tolist(), one.grades, numbers[source])
                about["negatives"] = dict(sorted(counts.items()))
                about["teacher"] = self.teacher.identity if self.teacher and self._asks else None
            self._draw(writer)
        self.progress(1, 1)
        return Lessons.open(self.out)

    def _lists(self, made: Lessons, kept: Judged, counts: Counter[str]) -> Iterator[tuple[Mined, int]]:
        """Lists by rows of `made`, and the number of the source of each."""
        settings = self.settings.negatives
        if not settings.count:
            for number, (query, passage) in enumerate(pairs_of(kept)):
                yield Mined(query, [passage], [int(kept.grades[number])]), int(kept.sources[number])
        elif len(kept):
            finder = self._finder(made)
            if settings.words and isinstance(finder, Dense):
                finder = Mixed.of(finder, Lexical(made, self._work / "words"))
            found = mine(
                self.teacher, finder, made, kept, settings, self._work / "ranked",
                seed=self.settings.seed, counts=counts, progress=self._step(4, 0, 1),
            )  # fmt: skip
            for one in found:
                yield one, kept.source(one.query, one.passages[0])

    def _draw(self, writer: LessonsWriter) -> None:
        settings = self.settings.datafree
        for role, total in (("query", settings.queries), ("passage", settings.passages)):
            if total:
                facts = settings.model_dump(mode="json", exclude={"queries", "passages", "batch_size"})
                source = writer.source("drawn from a vocabulary", kind="datafree", **facts)
                share = self._step(5, int(role == "passage"), 2)
                for text in datafree.texts(settings, role, seed=self.settings.seed, progress=share):  # type: ignore[arg-type]
                    if text and text not in self._excluded:
                        writer.text(text, role, source)  # type: ignore[arg-type]

    def _step(self, stage: int, part: int, parts: int) -> Progress:
        """Progress of one of the parts of one of six stages."""

        def share(done: int, total: int) -> None:
            within = min(done / total, 1.0) if total else 0.5
            self.progress(int(_STEPS * (stage + (part + within) / parts)), 6 * _STEPS)

        return share
