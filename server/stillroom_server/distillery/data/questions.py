"""Questions about the words of a dictionary, made from frames: what people type, about nearly everything, answered by nobody.

    What are the {attribute}s of {thing}?      what are the symptoms of breakbone fever
    why are {attribute}s of {thing} {quality}? how to {act} {thing}      {thing} {attribute}      ...

A student that is aligned on sentences and definitions alone places the words of a question, and misses what is asked: of a
disease, its outlook comes where its treatment was wanted. These texts teach it to put a frame, an attribute and a thing
together. Most make no sense, which a teacher of vectors does not mind: like pseudo-texts (`datafree`) they are never judged.

Words are WordNet's (`index.noun`, `.verb`, `.adj`; format: WNDB(5WN)): a thing is any noun, an attribute a noun of one word
that its tagged texts use, an act a verb of one word, a quality an adjective of one word.

| case | what happens |
|---|---|
| the folder lacks an index | `DataError` with the package that has it |
| a line that is not of the format | `DataError` with file and line |
| more questions than these words make, in so many tries | as many as were found |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillroom_server.distillery.data.wordnet import entries
from stillroom_shared.errors import DataError

FRAMES = (
    "What is {thing}?",
    "what are the {attributes} of {thing}",
    "What are the {attributes} of {thing}?",
    "what is the {attribute} of {thing}",
    "what causes {thing}",
    "how to {act} {thing}",
    "Is {thing} {quality}?",
    "who is {attribute} of {thing}?",
    "how many {attributes} are in {thing}?",
    "{attribute} for {thing}",
    "{thing} {attribute}",
    "when did {thing} {act}",
    "where is {thing}?",
    "why are {attributes} of {thing} {quality}?",
)
_TRIES = 4
"""Draws for each question that is wanted: few of them repeat one."""
_LEAST_ATTRIBUTE = 4
"""Letters."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What stands in the frames."""

    things: Sequence[str]
    attributes: Sequence[str]
    acts: Sequence[str]
    qualities: Sequence[str]


def questions(words: Words, count: int, *, seed: int) -> Iterator[str]:
    """So many different ones, or fewer where words run out; each frame in turn, words by chance.

    >>> words = Words(things=["tapir"], attributes=["use", "city"], acts=["feed"], qualities=["shy"])
    >>> found = list(questions(words, 99, seed=0))
    >>> found[0], found[4:6], "what are the cities of tapir" in found, len(found) == len({*found}) < 99
    ('What is tapir?', ['what causes tapir', 'how to feed tapir'], True, True)
    """
    random = np.random.default_rng(seed)
    seen: set[str] = set()

    def drawn(choices: Sequence[str]) -> str:
        return choices[int(random.integers(len(choices)))]

    for number in range(_TRIES * count):
        if len(seen) == count:
            return
        attribute = drawn(words.attributes)
        text = FRAMES[number % len(FRAMES)].format(
            thing=drawn(words.things), attribute=attribute, attributes=plural(attribute), act=drawn(words.acts),
            quality=drawn(words.qualities),
        )  # fmt: skip
        if text not in seen:
            seen.add(text)
            yield text


def plural(noun: str) -> str:
    """A regular one.

    >>> plural("symptom"), plural("cause"), plural("branch"), plural("city"), plural("day")
    ('symptoms', 'causes', 'branches', 'cities', 'days')
    """
    if re.search("(s|x|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"


def read_words(folder: Path) -> Words:
    """Words of the three indexes. Raises `DataError`."""
    nouns = list(_index(folder, "noun"))
    return Words(
        things=[word for word, _ in nouns],
        attributes=[word for word, tagged in nouns if tagged and word.isalpha() and len(word) >= _LEAST_ATTRIBUTE],
        acts=[word for word, _ in _index(folder, "verb") if " " not in word],
        qualities=[word for word, _ in _index(folder, "adj") if " " not in word],
    )


def _index(folder: Path, part: str) -> Iterator[tuple[str, bool]]:
    """Each word with whether tagged texts use it."""
    for line, where in entries(folder, [f"index.{part}"]):
        fields = line.split()
        try:
            pointers = int(fields[3])
            yield fields[0].replace("_", " "), int(fields[5 + pointers]) > 0
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{where}: not an entry of WordNet's index, {line[:40]!r}: take the files as they were released"
            ) from error
