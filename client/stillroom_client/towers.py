"""What a device encodes with: the release in use, its adapter, and what is loaded of them.

Another thread or process may put another release or adapter in use at any time. Whoever begins with documents or a query
follows it (`Towers.now`); whoever holds vectors that were made before must learn that they no longer fit (`refuse_another`).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_client.home import Identity, adapter_folder, adapter_in_use, replace_adapter
from stillroom_client.matryoshka import prefix
from stillroom_client.rerank import Reranker
from stillroom_client.store import InUse, Store
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import Release, SealedAdapter, open_release


class Towers:
    """The release of an open home, verified when it is first needed. Threads may share it."""

    def __init__(self, home: Path, identity: Identity, store: Store, *, threads: int) -> None:
        self._home = home
        self._identity = identity
        self._store = store
        self._threads = threads
        self._release: Release | None = None
        self._encoder: Encoder | None = None
        self._reranker: Reranker | None = None
        self._adapter_folder: str | None = None
        self._lock = threading.RLock()
        self.in_use = self._stored()

    @property
    def release(self) -> Release:
        """The release; `ReleaseError` when it does not hold or its document tower is not that of the index."""
        with self._lock:
            if self._release is None:
                folder = self._home / self.in_use.folder
                self._release = self._fitting(open_release(folder, trusted_key=self._identity.trusted_key))
            return self._release

    def take(self, release: Release) -> None:
        """Use a release that was verified before, if it is the one in use; `ReleaseError` otherwise."""
        trusted = release.manifest.public_key == self._identity.trusted_key
        if not trusted or release.folder != (self._home / self.in_use.folder).resolve():
            raise ReleaseError(
                f"{release.folder} is not the release that {self._home} links to: open the home without it"
            )
        self._release = self._fitting(release)

    @property
    def adapter(self) -> SealedAdapter | None:
        """The adapter in use, verified against the release; None before the first."""
        return adapter_in_use(self._home, self.in_use.folder, self.release, self._identity.trusted_key)

    @property
    def encoder(self) -> Encoder:
        """Both towers in int8 with the adapter in use."""
        with self._lock:
            if self._encoder is None:
                encoder = Encoder(self.release, precision="int8", threads=self._threads)
                self._adapt(encoder)
                self._encoder = encoder
            return self._encoder

    @property
    def reranker(self) -> Reranker:
        """The release's cross-encoder; `ReleaseError` if it brings none."""
        with self._lock:
            if self._reranker is None:
                self._reranker = Reranker(self.release, threads=self._threads)
            return self._reranker

    def now(self, *, dense: bool) -> tuple[InUse, Encoder | None]:
        """The release in use now, with its adapter of now, and its encoder where vectors are needed."""
        with self._lock:
            return self.follow(), self.encoder if dense else None

    def follow(self) -> InUse:
        """Take over the release and the adapter that another thread or process put in use since; what is in use now."""
        now = self._stored()
        with self._lock:
            if now != self.in_use:
                self.in_use, self._release, self._encoder, self._reranker = now, None, None, None
            elif self._encoder is not None and adapter_folder(self._home, now.folder) != self._adapter_folder:
                self._adapt(self._encoder)
        return now

    def still(self, in_use: InUse) -> bool:
        """Inside a transaction: whether the index is of the towers that were asked for before it."""
        return self._stored() == in_use

    def refuse_another(self) -> None:
        """Inside a transaction: `ReleaseError` when vectors that were made for this device no longer fit its index."""
        if (now := self._stored()) != self.in_use:
            raise ReleaseError(
                f"{self._home} moved on to the release in {now.folder!r}: begin again with a device opened anew"
            )

    def adopt(self, folder: Path) -> SealedAdapter:
        """See `Device.adopt`."""
        with self._lock, self._store.writing():  # one process at a time
            self.refuse_another()
            key = self._identity.trusted_key
            sealed = replace_adapter(self._home, self.in_use.folder, folder, self.release, key)
            if self._encoder is not None:
                self._adapt(self._encoder)
        return sealed

    def shortened(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors of the release (n, full) as this index has them (n, dim)."""
        return prefix(vectors, self._store.dimension, full=self._store.full_dimension)

    def _stored(self) -> InUse:
        found = self._store.in_use()
        return found if found.tower else replace(found, tower=self._identity.document_tower_hash)

    def _adapt(self, encoder: Encoder) -> None:
        folder, sealed = adapter_folder(self._home, self.in_use.folder), self.adapter
        encoder.adopt(sealed.adapter if sealed else None)
        self._adapter_folder = (
            folder  # noted last: one that does not verify is an error of every search, not of the first
        )

    def _fitting(self, release: Release) -> Release:
        """The release, if the index was built with its document tower."""
        if release.document_tower_hash != self.in_use.tower:
            raise ReleaseError(
                f"release {release.id} has document tower {release.document_tower_hash}, the index in {self._home} "
                f"was built with {self.in_use.tower}: restore the earlier release, then "
                "`stillroom index upgrade` embeds the documents anew"
            )
        return release
