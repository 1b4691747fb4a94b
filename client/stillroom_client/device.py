"""A device: its owner's documents, their index, and the release it searches with. Nothing in it ever leaves it.
Its files are laid out in `home.py`.

Guarantees: a release is used only while signature, hashes and document tower hold, checked when it is first needed, not
when vectors are given; what a search returns belongs to one generation of the store; kill the process at any point, and
nothing committed is lost and nothing half-written is served. Threads and processes may share a home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.cache import AnswerCache, CacheLimits
from stillroom_client.catalog import Catalog, Embedded
from stillroom_client.derived import Indexes, Replacing, State
from stillroom_client.encoder import Encoder
from stillroom_client.encrypting import Protection
from stillroom_client.home import (
    STORE_NAME,
    Identity,
    create_home,
    require_own_identity,
)
from stillroom_client.index_plan import IndexSettings
from stillroom_client.matryoshka import chosen_dimension
from stillroom_client.ranking import Hit, Mode
from stillroom_client.searching import search
from stillroom_client.store import Change, Feedback, Store, TowerChangedError
from stillroom_client.towers import Towers
from stillroom_client.unlocking import unlock
from stillroom_client.upgrade import Upgraded, drop_replaced, upgrade
from stillroom_shared.closing import Closing
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import Release, SealedAdapter, open_release


@dataclass(frozen=True, slots=True)
class Status:
    """What a device holds; `documents` by type.

    `index` (of vectors) and `text_index` are "current", or why they will be built before a search.
    """

    name: str
    generation: int
    passages: int
    owners: dict[str, int]
    dimension: int
    index: State
    text_index: State
    feedback: int
    documents: dict[str, int] = field(default_factory=dict)


class Device(Closing):
    """An open home; `Device.create` makes one, `Device.open` opens one, and both serve as context managers.

    Methods that take or return vectors use float32 rows of norm 1, (n, dim), dim being that of the index; they cut those that
    have the release's full length (`matryoshka.py`).
    """

    def __init__(
        self, home: Path, identity: Identity, store: Store, *, threads: int, cache: CacheLimits | None = None
    ) -> None:
        self.home = home
        self.identity = identity
        self.store = store
        self.catalog = Catalog(store)
        self.threads = threads
        self._indexes = Indexes(store.path.parent, store)
        self.cache = AnswerCache(cache or CacheLimits())
        self.towers = Towers(home, identity, store, threads=threads)

    @classmethod
    def create(
        cls,
        home: Path,
        release: Path | Release,
        *,
        trusted_key: str | None = None,
        link: bool = False,
        name: str = "",
        dimension: int | None = None,
        protection: Protection | None = None,
    ) -> Device:
        """Make an empty device in a new folder and open it.

        Args:
            release: its folder, verified here; or one that was opened before, so that a thousand simulated devices
                verify it once.
            trusted_key: the operator's public key. Without it the key that signed this release is trusted from now on.
            link: point to the release instead of copying it; for simulations.
            name: of the device; the folder's own name by default.
            dimension: of its index, at most the release's, which is the default (`matryoshka.py`).
            protection: encrypt the home from the beginning, and how it is to be unlocked.

        Raises:
            DataError: `home` exists and is not empty.
            ReleaseError: the release does not verify or is signed by another key.
        """
        source = release if isinstance(release, Release) else open_release(release, trusted_key=trusted_key)
        if trusted_key not in (None, source.manifest.public_key):
            raise ReleaseError(
                f"release {source.id} is signed by key {source.manifest.public_key}, but the trusted key is "
                f"{trusted_key}: name a release of the trusted operator"
            )
        length = chosen_dimension(dimension, source.dimension)
        create_home(home, source, link=link, name=name or home.resolve().name, dimension=length, protection=protection)
        return cls.open(home)

    @classmethod
    def open(
        cls,
        home: Path,
        *,
        threads: int = 1,
        release: Release | None = None,
        cache: CacheLimits | None = None,
        key: str | None = None,
    ) -> Device:
        """Open a home; `DataError` when this is no home of a device, `EncryptionError` when it stays locked.

        Args:
            threads: for the encoder.
            release: the one this home links to, verified before, so that a thousand simulated devices verify it once.
            cache: how many answers are kept to be served again (`cache.py`); `CacheLimits(entries=0)` keeps none.
            key: passphrase of an encrypted home; without it, the key is looked for where `unlock` says.
        """
        identity, private = Identity.load(home), unlock(home, passphrase=key)
        store = Store(private.folder / STORE_NAME, private.vault)
        try:
            require_own_identity(home, store)
        except BaseException:
            store.close()
            raise
        device = cls(home, identity, store, threads=threads, cache=cache)
        if release is not None:
            device.towers.take(release)
        return device

    @staticmethod
    def name_of(home: Path) -> str:
        """The name of the device that lives in `home`."""
        return Identity.load(home).name

    @property
    def release(self) -> Release:
        """The release, verified on first use; `ReleaseError` when it does not hold or its document tower is another."""
        return self.towers.release

    @property
    def adapter(self) -> SealedAdapter | None:
        """The adapter in use, verified against the release; None before the first."""
        return self.towers.adapter

    @property
    def encoder(self) -> Encoder:
        """The release's towers in int8 with the adapter in use, loaded on first use."""
        return self.towers.encoder

    @property
    def indexes(self) -> Indexes:
        """The derived files, for the modules that look after them."""
        return self._indexes

    def add(self, passages: Iterable[Passage], vectors: NDArray[np.float32] | None = None) -> Change:
        """Add or replace passages as one generation; one that is stored already is neither embedded nor touched.

        Args:
            vectors: of the release's document tower, (passages, dim); embedded here without them.
        """
        wanted = list(passages)
        if vectors is not None:
            return self.store.put(wanted, self.towers.shortened(vectors), tower=self.towers.in_use.tower)
        if not (fresh := self.store.changed(wanted)):
            return Change(0, 0, len(wanted))
        while True:
            embedded = self.embed(fresh)
            with suppress(TowerChangedError):
                change = self.store.put(fresh, embedded.vectors, tower=embedded.tower)
                return Change(change.added, change.replaced, len(wanted) - change.added - change.replaced)

    def embed(self, passages: Sequence[Passage]) -> Embedded:
        """The vectors of passages (n, dim), by the document tower of the release in use."""
        in_use, encoder = self.towers.now(dense=True)
        assert encoder is not None
        vectors = encoder.encode_documents([passage.full_text for passage in passages])
        return Embedded(self.towers.shortened(vectors), in_use.tower)

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of queries (n, dim), by the release's query tower with the adapter in use."""
        return self.towers.shortened(self.encoder.encode_queries(texts))

    def remove(self, ids: Iterable[str]) -> int:
        """Remove passages with their vectors and feedback; how many there were."""
        return self.store.remove(ids)

    def has(self, passage_id: str) -> bool:
        """Whether a passage of this id is stored."""
        return self.store.has(passage_id)

    def search(
        self,
        text: str,
        k: int = 10,
        *,
        mode: Mode = "hybrid",
        where: str | None = None,
        rerank: int = 0,
        cached: bool = True,
        adapted: bool = True,
    ) -> list[Hit]:
        """The k best passages for a plain text, best first; fewer when there are fewer.

        Args:
            mode: by vectors ("dense"), by words ("bm25", of passages that have one of them; needs no release), or by both.
            where: only passages that fulfil this filter (`filters.py`), `FilterError` when it cannot be read.
            rerank: read so many of the best again, at least k, with the release's reranker, and order by both
                (`rerank.py`); `ReleaseError` if it brings none. 20 is usual; 0 for none.
            cached: take the answer to the same or a like query (`cache.py`), and keep this one. False: neither.
            adapted: False searches with the release alone, to see what the adapter changes; such an answer is never cached.
        """
        cached = cached and adapted
        return search(self, text, k, mode=mode, where=where, rerank=rerank, cached=cached, adapted=adapted)

    def search_many(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[str]]:
        """Passage ids for each of many query vectors (n, dim), best first: what evaluation needs."""
        with self._indexes.vectors() as index:
            self.towers.refuse_another()
            _, rows = index.search(self.towers.shortened(vectors), k)
            names = self.store.names(np.unique(rows))
        return [[names[row] for row in own] for own in rows.tolist()]

    def candidates(self, vectors: NDArray[np.float32], k: int) -> tuple[list[list[str]], NDArray[np.float32]]:
        """Passage ids, n lists of m = min(k, passages), and their stored vectors (n, m, dim), nearest first.

        From the raw index, without filter or cache, each row from its own query vector alone.
        """
        with self._indexes.vectors() as index:
            self.towers.refuse_another()
            _, rows = index.search(self.towers.shortened(vectors), k)  # (n, m)
            known, stored = self.store.vectors(np.unique(rows))
            names = self.store.names(known)
        return [[names[row] for row in own] for own in rows.tolist()], stored[np.searchsorted(known, rows)]

    def vectors_of(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Stored vectors of passages (n, dim); `DataError` names the first that is not stored."""
        with self.store.reading():
            self.towers.refuse_another()
            rows = self.store.rows(ids)
            known, stored = self.store.vectors(np.unique(rows))
        return stored[np.searchsorted(known, rows)]

    def record(self, opened: Iterable[Feedback | tuple[str, str]]) -> None:
        """Keep which passage was opened after which query: the training data of rounds. `DataError` if unknown."""
        self.store.record(Feedback(*pair) for pair in opened)

    def feedback(self) -> list[Feedback]:
        """What was opened, (query, passage id), each pair once, latest last."""
        return self.store.feedback()

    def erase_feedback(self, opened: Feedback | None = None) -> int:
        """Forget what was opened, all of it or one pair, on the disk too; how many pairs there were."""
        return self.store.erase_feedback(opened)

    def adopt(self, folder: Path) -> SealedAdapter:
        """Verify a published adapter and search with it from now on, also after a restart.

        Raises:
            ReleaseError: it is not for this release or not of the trusted key; the adapter before it stays in use.
        """
        return self.towers.adopt(folder)

    def upgrade(self, folder: Path, *, report: Callable[[int, int], None] = lambda done, total: None) -> Upgraded:
        """Search with another release from now on, after embedding all documents anew if need be; see `upgrade.py`."""
        done = upgrade(self, folder, report=report)
        self.towers.follow()
        return done

    @property
    def replacing_vectors(self) -> Replacing:
        """See `Indexes.replacing`."""
        return self._indexes.replacing

    def refresh_index(self) -> None:
        """Bring the saved indexes up to date now, so that the next search need not."""
        self._indexes.refresh()

    def checkpoint(self) -> None:
        """Do so if much was added since: for whoever adds for long, between two additions."""
        self._indexes.checkpoint()

    def compact(self) -> None:
        """Build the indexes from nothing, without what was removed, and give space back to the disk."""
        drop_replaced(self.store)
        self._indexes.compact()

    @property
    def index_settings(self) -> IndexSettings:
        """What kind of vector index this device keeps and how thoroughly it searches; setting it brings the index in line."""
        return self._indexes.settings

    @index_settings.setter
    def index_settings(self, asked: IndexSettings) -> None:
        self._indexes.settings = asked
        self._indexes.refresh()

    def index_in_use(self) -> dict[str, int | str]:
        """What the vector index is now: its kind, how thoroughly it is searched, passages in it and beside it."""
        with self._indexes.vectors() as dense:
            return dense.described()

    def status(self) -> Status:
        """What is stored, as one generation, and in what state its index is."""
        with self.store.reading() as generation:
            states = self._indexes.states(generation)
            return Status(
                name=self.identity.name,
                generation=generation.number,
                passages=self.store.count(),
                owners=self.store.owners(),
                dimension=self.store.dimension,
                index=states[0],
                text_index=states[1],
                feedback=len(self.store.feedback()),
                documents=self.catalog.types(),
            )

    def close(self) -> None:
        """Give the files back."""
        self.store.close()
