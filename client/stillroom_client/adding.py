"""Bring an index in line with files: read what is new or changed, embed what it says anew, remove what is gone.

Guarantees
- What did not change is neither read (same size and date) nor embedded (same bytes, or same text) again.
- One file that cannot be read costs a line, never another file; what is indexed of its earlier version stays.
- A document leaves the index only when its file is certainly gone: not when its folder cannot be read, nor when a whole
  folder is empty that was not, as when a disk is not mounted.
- Interrupt it anywhere: each document is in the index whole or not at all, and the vectors made for unfinished ones are used
  by the next run (`catalog.py`).

One process reads files while this one embeds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from stillroom_client.catalog import Catalog, Embedded
from stillroom_client.documents import Document, Located
from stillroom_client.readers.blocks import Reading, UnreadableError
from stillroom_client.readers.kinds import VERSION
from stillroom_client.reading import File, Parser, corpus_lines, digest_of_file, document, load, located
from stillroom_client.store import Change, TowerChangedError
from stillroom_client.walking import Remark, Walk, is_below, is_gone, walk
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import DataError

LIMIT = 100_000_000  # bytes of the largest file that is read whole
_BATCH = 64  # passages that are embedded between two commits
_RESOLUTION_NS = 2_000_000_000  # of the clocks of file systems; FAT has the coarsest
_AHEAD = 4  # documents that are read ahead of embedding


_NONE = Change(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Tally:
    """How far a run is: files and bytes of those that it has to read, and passages embedded so far."""

    files: int = 0
    of_files: int = 0
    bytes: float = 0
    of_bytes: int = 0
    passages: int = 0


@dataclass
class Added:
    """What a run did, in documents and passages, and its remarks. `failed` counts the files and folders that were not read."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    passages: Change = _NONE
    embedded: int = 0
    hidden: int = 0
    remarks: list[Remark] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Remarks about what the owner asked for and did not get."""
        return sum(remark.kind == "failed" for remark in self.remarks)

    @property
    def did_something(self) -> bool:
        """Whether the index changed."""
        return bool(self.added or self.changed or self.removed)


Report = Callable[[Tally], None]
Embed = Callable[[Sequence[Passage]], Embedded]
_CORPUS = Reading("corpus", ())
_Outcome = tuple[File, Document, list[Located]] | tuple[File, Document, None]


class Adding:
    """Runs over the same paths, one after the other; what failed and did not change is not tried again.

    Args:
        embed: the vectors of passages, (n, dim), of norm 1, and whose they are.
        owner: of passages that name none.
        limit: bytes of the largest file to read.
        parser: reads what is in files; the caller closes it.
        report: is told how far a run is.
        checkpoint: is called now and then while documents are stored; for whoever keeps indexes of them.
    """

    def __init__(
        self,
        catalog: Catalog,
        paths: Iterable[Path],
        *,
        embed: Embed,
        owner: str,
        parser: Parser,
        limit: int = LIMIT,
        report: Report = lambda tally: None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self._catalog = catalog
        self._embedded = embed
        self._paths = list(paths)
        self._owner = owner
        self._reader = f"{VERSION} for {owner}"
        self._parser = parser
        self._limit = limit
        self._report = report
        self._checkpoint = checkpoint
        self._refused: dict[str, tuple[File, Remark]] = {}
        self._told: set[Remark] = set()

    def run(self) -> Added:
        """One pass: add, change, remove."""
        done, found = Added(), walk(self._paths)
        done.hidden = found.hidden
        done.remarks += found.remarks
        known = self._catalog.states()
        pending = [file for file in found.files.values() if not self._same(file, known.get(file.id))]
        done.unchanged = len(found.files) - len(pending)
        kept = [file.id for file in found.files.values() if self._same(file, known.get(file.id))]
        done.passages = Change(0, 0, self._catalog.count(kept))
        tally = _Meter(self._report, len(pending), sum(map(self._weight, pending)))
        self._embed(self._outcomes(pending, known, done, tally), known, done, tally)
        self._remove(found, known, done)
        if pending:
            self._catalog.unstage()
        return done

    def news(self, done: Added) -> list[Remark]:
        """The remarks of a run that no earlier run made."""
        fresh = [remark for remark in done.remarks if remark not in self._told]
        self._told = set(done.remarks)
        return fresh

    def _outcomes(
        self, pending: list[File], known: dict[str, Document], done: Added, tally: _Meter
    ) -> Iterator[_Outcome]:
        """What was read, in order; failures become remarks. Reads ahead of whoever asks."""
        with ThreadPoolExecutor(1) as pool:
            try:
                files = iter(pending)
                ahead = [(file, pool.submit(self._read, file, known.get(file.id))) for file in islice(files, _AHEAD)]
                while ahead:
                    file, future = ahead.pop(0)
                    try:
                        outcome, notes = future.result()
                        self._refused.pop(file.id, None)
                        done.remarks += [Remark("note", file.id, note) for note in notes]
                        yield outcome
                    except UnreadableError as error:
                        self._refuse(file, str(error), known, done)
                        tally.files(1, self._weight(file))
                    ahead += [(file, pool.submit(self._read, file, known.get(file.id))) for file in islice(files, 1)]
            finally:
                self._parser.close()  # ends what is being read, so that an interrupted run ends now
                pool.shutdown(cancel_futures=True)

    def _same(self, file: File, before: Document | None) -> bool:
        """Whether a file need not be opened: stored whole for this owner, and unchanged by size and date since."""
        return (
            before is not None
            and before.reader == self._reader
            and bool(before.digest)
            and (before.size, before.modified_ns) == (file.size, file.modified_ns)
            and before.modified_ns + _RESOLUTION_NS < before.read_ns
        )

    def _weight(self, file: File) -> int:
        """Bytes that there are to read of a file: none of one that is refused for its size."""
        return file.size if file.is_corpus or file.size <= self._limit else 0

    def _read(self, file: File, before: Document | None) -> tuple[_Outcome, tuple[str, ...]]:
        refused = self._refused.get(file.id)
        if refused and refused[0] == file:
            raise UnreadableError(refused[1].text)
        read_ns = time.time_ns()
        if file.is_corpus:
            try:
                digest = digest_of_file(file.path)
            except OSError as error:
                raise UnreadableError(f"cannot be read ({error.strerror}): check its permissions") from None
            same = before is not None and (before.digest, before.reader) == (digest, self._reader)
            found = document(file, _CORPUS, digest, read_ns, self._reader)
            return ((file, found, None) if same else (file, found, [])), ()
        content, now = load(file, limit=self._limit)
        digest = hashlib.sha256(content).digest()
        if before is not None and (before.digest, before.reader) == (digest, self._reader):
            return (file, replace(before, modified_ns=now.modified_ns, read_ns=read_ns), None), ()
        reading = self._parser.read(file.path.name, content)
        return (
            file,
            document(now, reading, digest, read_ns, self._reader),
            located(now, reading, self._owner),
        ), reading.notes

    def _refuse(self, file: File, text: str, known: dict[str, Document], done: Added) -> None:
        stays = "; its earlier version stays in the index" if file.id in known else ""
        kind: str = "skipped" if text.endswith("skipped") and not stays else "failed"
        remark = Remark("skipped" if kind == "skipped" else "failed", file.id, text)
        self._refused[file.id] = (file, remark)
        done.remarks.append(replace(remark, text=text + stays))

    def _embed(self, outcomes: Iterator[_Outcome], known: dict[str, Document], done: Added, tally: _Meter) -> None:
        """Store what was read, several small documents embedded together."""
        batch: list[tuple[File, Document, list[Located]]] = []
        for file, found, passages in outcomes:
            if passages is None:
                self._catalog.seen(found)
                done.unchanged += 1
                done.passages = _sum(done.passages, Change(0, 0, self._catalog.count([file.id])))
                tally.files(1, file.size)
            elif file.is_corpus:
                self._store(batch, known, done, tally)
                batch = []
                self._corpus(file, found, known, done, tally)
            else:
                batch.append((file, found, passages))
                if sum(len(passages) for _, _, passages in batch) >= _BATCH:
                    self._store(batch, known, done, tally)
                    batch = []
        self._store(batch, known, done, tally)

    def _embed_lacking(self, passages: Sequence[Passage]) -> Iterator[tuple[int, int]]:
        """Embed and keep the vectors of passages of which none is known, a batch at a time: its size, and that of all."""
        while fresh := self._catalog.lacking(passages):
            for start in range(0, len(fresh), _BATCH):
                part = fresh[start : start + _BATCH]
                try:
                    self._catalog.stage(part, self._embedded(part))
                except TowerChangedError:  # another release is in use since: what is lacking is another question now
                    break
                yield len(part), len(fresh)

    def _store(
        self, batch: list[tuple[File, Document, list[Located]]], known: dict[str, Document], done: Added, tally: _Meter
    ) -> None:
        size, counted = sum(file.size for file, _, _ in batch), 0.0
        for part, fresh in self._embed_lacking([item.passage for _, _, passages in batch for item in passages]):
            done.embedded += part
            tally.embedded(part, size * part / fresh)
            counted = size
        for file, found, passages in batch:
            try:
                change = self._catalog.put(found, passages)
            except DataError as error:
                done.remarks.append(Remark("failed", file.id, str(error)))
                continue
            self._count(file, change, known, done)
        self._checkpoint()
        tally.files(len(batch), size - counted)

    def _corpus(self, file: File, found: Document, known: dict[str, Document], done: Added, tally: _Meter) -> None:
        """A corpus grows by batches: each line is a document to whoever wrote it, and it may be too long to hold."""
        change, ids, size = Change(0, 0, 0), [], max(file.size, 1)
        try:
            lines = corpus_lines(file, self._owner)
            while part := list(islice(lines, _BATCH)):
                fresh = sum(count for count, _ in self._embed_lacking([item.passage for item in part]))
                change = _sum(change, self._catalog.put(found, part, whole=False))
                done.embedded += fresh
                ids += [item.passage.id for item in part]
                written = sum(len(item.passage.full_text) for item in part)
                tally.embedded(fresh, min(written, size))
                size -= min(written, size)
                self._checkpoint()
            change = _sum(change, Change(0, 0, 0, self._catalog.finish(found, ids)))
        except DataError as error:
            said = str(error).removeprefix(file.id).removeprefix(", ").removeprefix(": ")
            done.remarks.append(Remark("failed", file.id, said))
            done.passages = _sum(done.passages, change)
        else:
            self._count(file, change, known, done)
        tally.files(1, size)

    def _count(self, file: File, change: Change, known: dict[str, Document], done: Added) -> None:
        if file.id in known:
            done.changed += 1
        else:
            done.added += 1
        done.passages = _sum(done.passages, change)

    def _remove(self, found: Walk, known: dict[str, Document], done: Added) -> None:
        gone: list[str] = []
        for root in found.roots:
            below = [path for path in known if is_below(path, root)]
            if below and not any(is_below(path, root) for path in found.files):
                if not any(remark.path == root for remark in found.remarks):
                    done.remarks.append(Remark("failed", root, _EMPTY.format(len(below))))
                continue
            gone += [path for path in below if path not in found.files and is_gone(path)]
        if gone := list(dict.fromkeys(gone)):
            removed = self._catalog.remove(gone)
            done.removed = len(gone)
            done.passages = _sum(done.passages, Change(0, 0, 0, removed))


_EMPTY = (
    "holds no file that can be read, but {:,} of its documents are indexed: they stay, in case a disk is not mounted; "
    "`stillroom index remove` takes them out"
)


class _Meter:
    def __init__(self, report: Report, files: int, size: int) -> None:
        self._report = report
        self._tally = Tally(of_files=files, of_bytes=size)
        report(self._tally)

    def files(self, count: int, size: float) -> None:
        self._tally = replace(self._tally, files=self._tally.files + count, bytes=self._tally.bytes + size)
        self._report(self._tally)

    def embedded(self, passages: int, size: float) -> None:
        self._tally = replace(self._tally, passages=self._tally.passages + passages, bytes=self._tally.bytes + size)
        self._report(self._tally)


def _sum(one: Change, other: Change) -> Change:
    return Change(
        one.added + other.added,
        one.replaced + other.replaced,
        one.unchanged + other.unchanged,
        one.removed + other.removed,
    )
