"""From files to documents with located passages. What is in a file is read by a process of its own (`readers/`).

| file | what comes of it |
|---|---|
| unreadable, locked, damaged, binary, larger than the limit | `UnreadableError`: one line that says so |
| one that makes its parser hang, crash or fill the memory | the same, and the next file gets a new process |
| `.jsonl`, `.jsonl.gz` | one passage a line, as in BEIR's corpus.jsonl (`stillroom_shared.beir`), read line by line |
| anything else | passages that follow its structure (`readers/__init__.py`) |

The id of a passage is the file's path and a hash of what it says, so that editing one paragraph re-embeds that one only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import selectors
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from stillroom_client.documents import Document, Located, Position, Scalar
from stillroom_client.readers.blocks import Reading, UnreadableError
from stillroom_client.readers.decoding import decoded
from stillroom_client.readers.kinds import known
from stillroom_client.readers.worker import reading
from stillroom_shared.beir import read_lines
from stillroom_shared.closing import Closing
from stillroom_shared.corpus import Passage

PATIENCE = 120.0  # seconds for reading one file
CORPORA = (".jsonl", ".jsonl.gz")
_SNIFF = 1 << 14
_DAY = re.compile(r"\s*(\d{4})-(\d{1,2})-(\d{1,2})")


@dataclass(frozen=True, slots=True)
class File:
    """A file that was found. `id` is its absolute path as text, which names its document."""

    path: Path
    id: str
    size: int
    modified_ns: int

    @property
    def is_corpus(self) -> bool:
        """Whether it is read line by line."""
        return self.path.name.lower().endswith(CORPORA)


def path_id(path: Path) -> str:
    """A path as text: the bytes of a name that are no UTF-8 are spelt out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class Parser(Closing):
    """The process that reads documents, started when first needed and again after a file that ended it.

    Args:
        patience: seconds for one file.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, name: str, content: bytes) -> Reading:
        """What the document says; `UnreadableError` if nothing comes of it."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"name": name, "size": len(content)}).encode() + b"\n")
            process.stdin.write(content)
            process.stdin.flush()
            answer = json.loads(_answer(process.stdout, time.monotonic() + self._patience))
        except TimeoutError:
            self.close()
            raise UnreadableError(
                f"was not read within {self._patience:.0f} s: damaged, or made to keep its reader busy"
            ) from None
        except (OSError, EOFError, ValueError):
            self.close()
            raise UnreadableError("made its parser crash: open it and save it again") from None
        except BaseException:  # interrupted in mid-answer: the next file must not get it
            self.close()
            raise
        return reading(answer)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):  # flushes what nobody reads any more
                        stream.close()

    @staticmethod
    def _started() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is for the one who asked, and he ends this.
        return subprocess.Popen(
            [sys.executable, "-m", "stillroom_client.readers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )


def _answer(stream: IO[bytes], deadline: float) -> bytes:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        received = b""
        while b"\n" not in received:
            received += _some(selector, stream, deadline)
        head, _, rest = received.partition(b"\n")
        parts, missing = [rest], int(head) - len(rest)
        while missing > 0:
            parts.append(_some(selector, stream, deadline))
            missing -= len(parts[-1])
        return b"".join(parts)


def _some(selector: selectors.BaseSelector, stream: IO[bytes], deadline: float) -> bytes:
    if not selector.select(max(deadline - time.monotonic(), 0)):
        raise TimeoutError
    if not (received := os.read(stream.fileno(), 1 << 20)):
        raise EOFError
    return received


def load(file: File, *, limit: int) -> tuple[bytes, File]:
    """The bytes of a file, and what it was when they were read.

    Args:
        limit: bytes; a larger file is refused.

    Raises:
        UnreadableError: it is too large, no regular file, binary, or cannot be opened.
    """
    try:
        # Without waiting: a file that became a pipe since it was found would wait for a writer for ever.
        with open(os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableError("is no regular file (a pipe, socket or device): skipped")
            if found.st_size > limit:
                raise UnreadableError(
                    f"has {found.st_size / 1e6:,.0f} MB, over the limit of {limit / 1e6:,.0f} MB: raise it with --max-size"
                )
            start = stream.read(_SNIFF)
            if not known(file.path.name) and not start.startswith(b"%PDF-"):
                decoded(start)  # a film of a gigabyte must not be read to learn that it is no text
            content = start + stream.read(limit + 1 - len(start))
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror}): check its permissions") from None
    return content, File(file.path, file.id, len(content), found.st_mtime_ns)


def digest_of_file(path: Path) -> bytes:
    """SHA-256 of a file, however long it is."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def document(file: File, found: Reading, digest: bytes, read_ns: int, reader: str) -> Document:
    """The document of a file that was read."""
    changed = datetime.fromtimestamp(file.modified_ns / 1e9, UTC)
    date = _date(found.metadata.get("date")) or changed.date().isoformat()
    name = file.id.rpartition("/")[2]
    title = found.title or name
    metadata: dict[str, Scalar] = {
        **found.metadata,
        "type": found.type,
        "path": file.id,
        "name": name,
        "suffix": file.path.suffix[1:].lower(),
        "title": title,
        "size": file.size,
        "modified": changed.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "date": date,
        "year": int(date[:4]),
    }
    return Document(
        path=file.id, type=found.type, title=title, size=file.size, modified_ns=file.modified_ns, read_ns=read_ns,
        digest=digest, reader=reader, metadata=metadata,
    )  # fmt: skip


def located(file: File, found: Reading, owner: str) -> list[Located]:
    """Its passages. What stands there twice under the same title is one passage, where it stands first."""
    passages: dict[str, Located] = {}
    for block in found.blocks:
        if not any(letter.isalnum() for letter in block.text):
            continue
        title = " > ".join(block.headings)
        key = hashlib.sha256(f"{title}\n{block.text}".encode()).hexdigest()[:12]
        position = Position(place=len(passages), page=block.page, line=block.line, start=block.start, stop=block.stop)
        metadata = {"section": title, **block.metadata} if title else dict(block.metadata)
        passage = Passage(f"{file.id}#{key}", owner, block.text, title)
        passages.setdefault(passage.id, Located(passage, position, metadata))
    return list(passages.values())


def corpus_lines(file: File, owner: str) -> Iterator[Located]:
    """The passages of a file like corpus.jsonl, with their own ids; `DataError` names file, line and field."""
    for place, line in enumerate(read_lines(file.path, owner=owner)):
        yield Located(line.passage, Position(place=place, line=line.number), line.metadata)


def _date(given: Any) -> str | None:
    """A day as ISO 8601 spells it; None when it is none."""
    if not isinstance(given, str) or not (found := _DAY.match(given)):
        return None
    try:
        return datetime(int(found[1]), int(found[2]), int(found[3])).date().isoformat()
    except ValueError:
        return None
