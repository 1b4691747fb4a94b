"""Passages from an owner's files.

| file | passages |
|---|---|
| `.jsonl`, `.jsonl.gz` | one a line, as in BEIR's corpus.jsonl (`stillroom_shared.beir`) |
| `.txt` | one a paragraph; blank lines separate them |
| `.md` | the same; a heading alone in its paragraph is the title of those below it |

A folder stands for the files below it, or for its `corpus.jsonl` or `corpus.jsonl.gz` when it has one. The id of a
paragraph is the file's path and a hash of what it says, so that editing one paragraph re-embeds that one only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stillroom_shared.beir import read_passages
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

_LINES = (".jsonl", ".jsonl.gz")
_TEXTS = (".txt", ".md")
_CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz")


@dataclass(frozen=True)
class Document:
    """The passages of one file. Ids that begin with `prefix` and are not among them are of an earlier version of it."""

    path: Path
    passages: tuple[Passage, ...]
    prefix: str | None


def read_documents(paths: Iterable[Path], *, owner: str) -> list[Document]:
    """Read files and folders; `owner` is for passages that do not name their own.

    Raises:
        DataError: naming the file, and the line and field where there is one.
    """
    documents = [_read(path, owner) for path in dict.fromkeys(file for given in paths for file in _files(given))]
    first: dict[str, Path] = {}
    for document in documents:
        for passage in document.passages:
            if (other := first.setdefault(passage.id, document.path)) != document.path:
                raise DataError(
                    f"passage id {passage.id!r} occurs in {other} and in {document.path}: add them to different homes"
                )
    return documents


def _files(given: Path) -> list[Path]:
    path = given.resolve()
    if path.is_dir():
        if corpus := [path / name for name in _CORPUS_NAMES if (path / name).is_file()]:
            return corpus[:1]
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is(file, _TEXTS))
        if not found:
            raise DataError(f"{given} holds no {_CORPUS_NAMES[0]}, .txt or .md file: name another folder")
        return found
    if not path.exists():
        raise DataError(f"{given} does not exist: name a file or a folder")
    if not _is(path, _LINES + _TEXTS):
        raise DataError(
            f"{given} is of no kind that can be read: give {', '.join(_LINES + _TEXTS)} or a folder of these"
        )
    return [path]


def _read(path: Path, owner: str) -> Document:
    if _is(path, _LINES):
        return Document(path, read_passages(path, owner=owner), None)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give a text file in UTF-8 that you may read") from error
    prefix = f"{path}#".encode(errors="replace").decode()  # a name may hold bytes that are no text
    return Document(path, tuple(_paragraphs(prefix, text, owner, headings=_is(path, (".md",)))), prefix)


def _is(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _paragraphs(prefix: str, text: str, owner: str, *, headings: bool) -> Iterator[Passage]:
    title, seen = "", set()
    for block in re.split(r"\n\s*\n", text):
        paragraph = block.strip()
        if headings and (heading := re.fullmatch(r"#{1,6}\s+(.+?)[ #]*", paragraph)):
            title = heading[1]
        elif any(character.isalnum() for character in paragraph):
            key = hashlib.sha256(f"{title}\n{paragraph}".encode()).hexdigest()[:12]
            if key not in seen:
                seen.add(key)
                yield Passage(f"{prefix}{key}", owner, paragraph, title)
