"""Queries cut out of a passage itself: no model, no download.

| maker | a query is | source |
|---|---|---|
| crop | a span of words at a random place, of random length | independent cropping of Contriever, arXiv 2112.09118 |
| sentence | one of its sentences of 4 to 32 words (`stillroom_server.distil.crop_sentences`) | ICT, arXiv 1906.00300 |
| title | its first line, where a longer text follows | titles as queries, as in arXiv 2112.09118, table 9 |
| summary | its first sentence below the title | the summary line of a docstring |

The words stay in the passage: what is learnt is mostly lexical, which a teacher's vector of the query makes up for.
Chance depends on the passage and the seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from stillroom_server.distil import crop_sentences
from stillroom_server.distillery.data.sampling import mark
from stillroom_server.distillery.data.settings import SyntheticSettings

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_TITLE_WORDS = 24


def crop(passage: str, count: int, *, words: tuple[int, int], seed: int) -> list[str]:
    """Spans of `words[0]` to `words[1]` words, uniform in length and place; shorter than the passage where that is possible.

    >>> crop("one two three four", 2, words=(4, 4), seed=0)
    ['one two three four', 'one two three four']
    """
    tokens = passage.split()
    random = np.random.default_rng([mark(passage, seed), seed])
    longest = max(words[0], min(words[1], len(tokens) - 1))
    spans = []
    for _ in range(count):
        length = min(int(random.integers(words[0], longest + 1)), len(tokens))
        start = int(random.integers(0, len(tokens) - length + 1))
        spans.append(" ".join(tokens[start : start + length]))
    return spans


def sentences(passage: str, count: int, *, seed: int) -> list[str]:
    """Some of its sentences, those of the lowest hash."""
    return sorted(crop_sentences([passage], skip=set()), key=lambda sentence: mark(sentence, seed))[:count]


def title(passage: str) -> list[str]:
    """Its title, if it has one.

    >>> title("Tapirs\\nThey eat leaves, mostly at night."), title("They eat leaves.\\nAt night."), title("Tapirs")
    (['Tapirs'], [], [])
    """
    first, _, rest = passage.partition("\n")
    heading = first.strip()
    alone = heading and heading[-1] not in ".!?;,:" and len(heading.split()) <= _TITLE_WORDS
    return [heading] if alone and len(rest.split()) > len(heading.split()) else []


def summary(passage: str) -> list[str]:
    """Its first sentence below the title, if something follows.

    >>> summary("Tapirs\\nThey eat leaves. They sleep."), summary("They eat leaves.")
    (['They eat leaves.'], [])
    """
    body = passage.partition("\n")[2] if title(passage) else passage
    first, *rest = _SENTENCE.split(body.strip(), maxsplit=1)
    return [" ".join(first.split())] if any(part.strip() for part in rest) else []


def distinct(queries: Sequence[str]) -> list[str]:
    """Each once, in order; case and white space make no difference.

    >>> distinct(["a b", "A  b", "c"])
    ['a b', 'c']
    """
    return list({" ".join(query.casefold().split()): query for query in reversed(queries)}.values())[::-1]


def acceptable(query: str, passage: str, settings: SyntheticSettings) -> bool:
    """Whether it has the words of a query, mostly of letters, and is not the passage again."""
    wordy = settings.shortest <= len(query.split()) <= settings.longest
    return wordy and 2 * sum(map(str.isalpha, query)) > len(query) and query != " ".join(passage.split())
