"""Lessons for a cross-encoder straight from BEIR folders: the queries of their train split, with mined negatives.

Queries that are measured on (dev and test of the same folders) must not occur in any text. Work in progress is kept, so the
same call goes on from it (`data/prepare.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stillroom_server.distillery.data.prepare import prepare_lessons
from stillroom_server.distillery.data.settings import DataSettings, ExcludeSettings, NegativeSettings, SourceSettings
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.teachers.opening import open_teacher
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.teaching import TeachSettings
from stillroom_server.distillery.vectors import VectorCache
from stillroom_shared.processor import native_bfloat16

WORDS = "words"
"""As a miner: passages that share words with the query, without any model."""


def taught_data(folders: Sequence[Path], settings: TeachSettings) -> DataSettings:
    """What is prepared: lists as long as are read.

    >>> taught_data([Path("zoo"), Path("far/zoo")], TeachSettings(candidates=4)).negatives.count
    3
    """
    names = [folder.resolve().name for folder in folders]
    sources = tuple(
        SourceSettings(kind="beir", data=str(folder), name=name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    )
    count = settings.candidates - 1
    return DataSettings(
        sources=sources,
        exclude=ExcludeSettings(folders=tuple(folders)),
        negatives=NegativeSettings(count=count, last=max(count, 100)),
        seed=settings.seed,
    )


def lessons_from(
    folders: Sequence[Path],
    settings: TeachSettings,
    out: Path,
    *,
    miner: str,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lessons:
    """Lessons at `out`, made or as they are.

    Args:
        folders: in BEIR layout, each with judged train queries.
        miner: the bi-encoder that finds hard negatives, by folder or name; `words` mines by shared words.
        cache: folder of its vectors by content.
        progress: (done, total).

    Raises:
        DataError: a folder is malformed, or `out` holds other lessons.
        SettingsError: there is no such miner.
    """
    precision = "bfloat16" if native_bfloat16() else "float32"
    teacher = None if miner == WORDS else open_teacher(TeacherSettings(model=miner, precision=precision))
    data = taught_data(folders, settings)
    return prepare_lessons(data, out, teacher=teacher, cache=VectorCache(cache), progress=progress)
