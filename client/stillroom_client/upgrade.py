"""Another release for a device: its documents are embedded anew beside what is in use, then everything switches at once.

With the same document tower there is nothing to embed, and the switch comes at once. Otherwise the new vectors gather in the
table `reembedded`, batch by batch, while searches and additions go on with the old ones; then one transaction replaces all
vectors, names the new release and begins a generation. Nobody sees a mixture:

| who | at the moment of the switch |
|---|---|
| a search | finds out in its transaction that its query was encoded by the old tower, and encodes it again |
| whoever adds documents | is refused its old vectors (`TowerChangedError`), and embeds them again |
| another upgrade at the same time | the one that began later goes on, the other stops with an error |
| a killed or interrupted upgrade | the old release stays in use; the next run goes on with what is embedded |
| a round of a federation | was for the old release, and is declined from then on |

Adapters belong to a release: the new one begins without. The release before this one stays in the home until the next upgrade,
because another process may be reading it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stillroom_client.encoder import Encoder
from stillroom_client.home import adapter_link, release_folder
from stillroom_client.quantization import quantize
from stillroom_client.store import Store
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import ReleaseError
from stillroom_shared.files import private_folder
from stillroom_shared.release import Release, open_release

if TYPE_CHECKING:
    from stillroom_client.device import Device

_BATCH = 64  # passages embedded between two commits; fewer that are left are embedded while nobody else may write
_TARGET = "reembedding"  # key in `meta`: the document tower that `reembedded` is of

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What an upgrade did, in passages; both 0 when the document tower stayed or the release was in use already."""

    release: str
    embedded: int
    passages: int


def upgrade(device: Device, folder: Path, *, report: Report = lambda done, total: None) -> Upgraded:
    """Make a device search with another release of the operator it trusts.

    Args:
        report: is told how many passages are embedded, and of how many.

    Raises:
        ReleaseError: the release does not verify, or is signed by another key; the one in use stays.
    """
    release = open_release(folder, trusted_key=device.identity.trusted_key)
    if release.id == device.release.id:
        return Upgraded(release.id, 0, 0)
    shortened = device.store.dimension != device.store.full_dimension
    if shortened and release.document_tower_hash != device.release.document_tower_hash:
        raise ReleaseError(
            f"the vectors of {device.home} are shortened to {device.store.dimension}, and release {release.id} has another "
            "document tower: make a new home with it (`stillroom index create --dimension`) and add the documents there"
        )
    name = _bring(device.home, release, device.release)
    release = open_release(
        device.home / name, trusted_key=device.identity.trusted_key
    )  # what is used later is the copy
    before = device.store.in_use()
    embedded = 0
    with device.store.twin() as store:
        if release.document_tower_hash == device.release.document_tower_hash:
            with store.writing():
                _name(store, name, release)
        else:
            embedded = _reembed(device, store, release, name, report)
        _forget(device.home, store, {name, before.folder})
        count = store.count()
    return Upgraded(release.id, embedded, count if embedded else 0)


def _bring(home: Path, release: Release, present: Release) -> str:
    """Copy a release into the home, or link to it where the present one is a link; its folder's name."""
    name = release_folder(release)
    target = home / name
    if target.is_dir():
        with suppress(ReleaseError):
            if open_release(target, trusted_key=release.manifest.public_key).id == release.id:
                return name
        shutil.rmtree(target)
    if present.folder.parent != home.resolve():
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(release.folder, home.resolve()), target_is_directory=True)
        return name
    with private_folder(target) as partial:
        shutil.copytree(release.folder, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return name


def _name(store: Store, name: str, release: Release) -> None:
    length = release.dimension if store.dimension == store.full_dimension else store.dimension  # of the same tower
    pairs = {"release": name, "tower": release.document_tower_hash, "dimension": length}
    store.execute_many("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs.items())


def _reembed(device: Device, store: Store, release: Release, name: str, report: Report) -> int:
    encoder = Encoder(release, precision="int8", threads=device.threads)

    def vectors(passages: list[Passage]) -> NDArray[np.float32]:
        return encoder.encode_documents([passage.full_text for passage in passages])

    with store.writing():
        if store.query("SELECT value FROM meta WHERE key = ?", (_TARGET,)) != [(release.document_tower_hash,)]:
            store.query("DELETE FROM reembedded")
            store.query("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_TARGET, release.document_tower_hash))
    embedded = 0
    while True:
        while len(lacking := _lacking(store)) == _BATCH:
            made = vectors(list(lacking.values()))
            with store.writing():
                _require_target(store, release)
                embedded += _insert(store, lacking, made)
            report(store.query("SELECT count(*) FROM reembedded")[0][0], store.count())
        with device.replacing_vectors() as switch, store.writing():
            _require_target(store, release)
            if len(lacking := _lacking(store)) < _BATCH:
                embedded += _insert(store, lacking, vectors(list(lacking.values())))
                switch(store, lambda: _switch(store, name, release))
                break
    drop_replaced(store)
    report(store.count(), store.count())
    return embedded


def _lacking(store: Store) -> dict[int, Passage]:
    """Rows and passages that are not embedded anew, a batch at most."""
    found = store.query(
        "SELECT p.row, p.id, p.owner, p.text, p.title FROM passages p LEFT JOIN reembedded r ON r.row = p.row "
        "WHERE r.row IS NULL ORDER BY p.row LIMIT ?",
        (_BATCH,),
    )
    return {row[0]: Passage(*row[1:]) for row in found}


def _require_target(store: Store, release: Release) -> None:
    """Inside a transaction: `ReleaseError` when what is gathered in `reembedded` is by another release's tower meanwhile."""
    if store.query("SELECT value FROM meta WHERE key = ?", (_TARGET,)) != [(release.document_tower_hash,)]:
        raise ReleaseError(
            f"another upgrade of this home began or ended meanwhile, and this one to {release.id[:16]} stops: run one at "
            "a time"
        )


def _insert(store: Store, rows: dict[int, Passage], vectors: NDArray[np.float32]) -> int:
    if not rows:
        return 0
    codes, scales = quantize(vectors)
    values = ((float(scales[n]), codes[n].tobytes(), row) for n, row in enumerate(rows))
    # A row may have gone since it was read.
    store.execute_many("INSERT OR REPLACE INTO reembedded SELECT row, ?, ? FROM passages WHERE row = ?", values)
    return len(rows)


def _switch(store: Store, name: str, release: Release) -> None:
    """The new vectors take the place of the old ones by name: a million of them as fast as one."""
    for statement in (
        "ALTER TABLE vectors RENAME TO replaced",
        "ALTER TABLE reembedded RENAME TO vectors",
        "ALTER TABLE replaced RENAME TO reembedded",
        "DELETE FROM staged",
        f"DELETE FROM meta WHERE key = '{_TARGET}'",
    ):
        store.query(statement)
    _name(store, name, release)


def drop_replaced(store: Store) -> None:
    """Delete the vectors that an upgrade replaced, if it died before it did so."""
    with store.writing():
        if not store.query("SELECT 1 FROM meta WHERE key = ?", (_TARGET,)):
            store.query("DELETE FROM reembedded")


def _forget(home: Path, store: Store, kept: set[str]) -> None:
    """Remove releases that are neither in use nor the one before."""
    assert store.in_use().folder in kept
    for other in home.glob("release*"):
        if other.name not in kept:
            adapter_link(home, other.name).unlink(missing_ok=True)
            other.unlink() if other.is_symlink() else shutil.rmtree(other, ignore_errors=True)
