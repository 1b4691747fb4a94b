"""A made query stays if the teacher leads it back to its passage (round-trip consistency; Alberti et al. 2019,
arXiv 1906.05416; for retrieval Promptagator, arXiv 2209.11755, where the first rank is asked for).

The rank of a passage is one more than the number of passages that score above it, those aside that the query is known to
belong to as well. Exact over all passages for a teacher with vectors; among what a search finds for any other
(`candidates`): then a query that its own words do not lead to anything is judged by fewer competitors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_server.distillery.data.candidates import Dense, Finder, Judged, ranked
from stillroom_server.distillery.data.settings import RoundTripSettings
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.teachers.base import Teacher


def ranks(
    teacher: Teacher,
    finder: Finder,
    lessons: Lessons,
    judged: Judged,
    settings: RoundTripSettings,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.int64]:
    """The rank of each judged passage for its query, (judgements,) in the order of `judged.passages`.

    Ranks up to `settings.top` are exact (see above); beyond, they are only known to be beyond.
    """
    top = settings.top or 1
    exact = isinstance(finder, Dense) and finder.embedder is teacher
    # Passages known to be relevant don't count, so as many more are looked at.
    count = (top if exact else max(settings.candidates, top)) + judged.most
    found = np.empty(len(judged.passages), np.int64)
    place = 0
    for one in ranked(teacher, finder, lessons, judged, count, folder, progress=progress):
        rivals = one.scores[one.others]
        for score in one.relevant_scores:
            found[place] = 1 + int((rivals > score).sum())
            place += 1
    return found
