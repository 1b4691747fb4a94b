"""The home of a device: a folder that only its owner can read, and what lies where in it.

| name | holds |
|---|---|
| `device.json` | name, trusted key, hash of the document tower that the index was built with |
| `release/` | the first release, copied; or a relative link to it |
| `release-ID/` | a later one (`upgrade.py`); the store says which is in use |
| `adapter`, `adapter-ID` | a link to the adapter in use with that release, as it was sealed; absent before the first |
| `store.sqlite3` | the truth: passages, vectors, feedback |
| `index.faiss` | vectors; derived from the store by whoever searches first after a change |
| `serving/` | socket, token and certificate of `stillroom serve` (`serving/places.py`); absent before the first |
| `index.tantivy/` | words; derived in the same way, one folder a generation (`text_index.py`) |

An encrypted home keeps the store, the indexes, and all that other modules call private, in a folder `sealed/` (`unlocking.py`).

`participation.py` adds a ledger, its key and what the owner consents to. Homes appear whole or not at all, and an
adapter is replaced in one step.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom_client.encrypting import Protection, new_private
from stillroom_client.store import Store
from stillroom_client.unlocking import SEALED_NAME
from stillroom_shared.errors import DataError, EncryptionError
from stillroom_shared.files import private_folder, sync
from stillroom_shared.release import Release, SealedAdapter, open_adapter, open_release

IDENTITY_NAME = "device.json"
RELEASE_NAME = "release"
ADAPTER_NAME = "adapter"
STORE_NAME = "store.sqlite3"
INDEX_NAME = "index.faiss"
TEXT_INDEX_NAME = "index.tantivy"
_IDENTITY = "identity"  # key in `meta`: SHA-256 of `device.json`


class Identity(BaseModel):
    """Content of `device.json`. `trusted_key` is the only key whose releases and adapters the device takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    trusted_key: str
    document_tower_hash: str

    @classmethod
    def load(cls, home: Path) -> Identity:
        """Read it; `DataError` says what to do when `home` is no home of a device."""
        path = home / IDENTITY_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{home} is not the home of a device: make one with "
                f"`stillroom index create --home {shlex.quote(str(home))} --release RELEASE`"
            ) from None
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} cannot be read ({error}): restore it, or create the device again") from error


def create_home(
    home: Path, release: Release, *, link: bool, name: str, dimension: int, protection: Protection | None = None
) -> None:
    """Fill a new home; see `Device.create`."""
    if home.exists() and not (home.is_dir() and not any(home.iterdir())):
        raise DataError(f"{home} exists and is not empty: choose another home, or remove it first")
    key = release.manifest.public_key
    with private_folder(home) as partial:
        if link:
            target = os.path.relpath(release.folder, home.parent.resolve() / home.name)
            (partial / RELEASE_NAME).symlink_to(target, target_is_directory=True)
        else:
            shutil.copytree(release.folder, partial / RELEASE_NAME, copy_function=shutil.copyfile)
            open_release(partial / RELEASE_NAME, trusted_key=key)  # what is used later is the copy
        full = release.dimension
        if protection is None:
            Store.create(partial / STORE_NAME, dimension=dimension, full_dimension=full)
        else:
            (partial / SEALED_NAME).mkdir()
            with new_private(partial / SEALED_NAME, protection) as private:
                path, vault = private.folder / STORE_NAME, private.vault
                Store.create(path, dimension=dimension, full_dimension=full, vault=vault)
        identity = Identity(name=name, trusted_key=key, document_tower_hash=release.document_tower_hash)
        (partial / IDENTITY_NAME).write_text(identity.model_dump_json(indent=1) + "\n")


def require_own_identity(home: Path, store: Store) -> None:
    """Of an encrypted home: `EncryptionError` unless `device.json` says what it said when the home was first opened.

    It lies in the clear, and names the key whose releases and adapters are trusted.
    """
    if store.vault.is_plain:
        return
    found = hashlib.sha256((home / IDENTITY_NAME).read_bytes()).digest()
    known = store.query("SELECT value FROM meta WHERE key = ?", (_IDENTITY,))
    if (bytes(known[0][0]) if known else store.secret(_IDENTITY, first=found)) != found:
        raise EncryptionError(f"{home / IDENTITY_NAME} was altered: restore it from a backup of this home")


def release_folder(release: Release) -> str:
    """The name of a release's folder in a home that was upgraded to it."""
    return f"{RELEASE_NAME}-{release.id[:16]}"


def adapter_link(home: Path, release: str) -> Path:
    """The link to the adapter in use with the release in that folder."""
    return home / (ADAPTER_NAME + release.removeprefix(RELEASE_NAME))


def adapter_folder(home: Path, release: str) -> str | None:
    """What the link to the adapter points to; None before the first."""
    try:
        return os.readlink(adapter_link(home, release))
    except OSError:
        return None


def adapter_in_use(home: Path, name: str, release: Release, trusted_key: str) -> SealedAdapter | None:
    """The adapter that a home uses with the release in folder `name`, verified against it; None before the first."""
    link = adapter_link(home, name)
    return open_adapter(link, release=release, trusted_key=trusted_key) if link.is_symlink() else None


def replace_adapter(home: Path, name: str, folder: Path, release: Release, trusted_key: str) -> SealedAdapter:
    """Verify a published adapter, copy it into the home and put it in use. One caller at a time."""
    open_adapter(folder, release=release, trusted_key=trusted_key)  # copy nothing that was not vouched for
    link, kept = adapter_link(home, name), f".{ADAPTER_NAME}-{secrets.token_hex(8)}"
    with private_folder(home / kept) as partial:
        shutil.copytree(folder, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
        sealed = open_adapter(partial, release=release, trusted_key=trusted_key)  # what is used later is the copy
    # The adapter before this one stays until the next: another process may be reading it.
    needed = {kept, os.readlink(link)} if link.is_symlink() else {kept}
    fresh = home / f"{ADAPTER_NAME}.partial"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(kept, target_is_directory=True)
    fresh.replace(link)
    sync(home)
    for old in home.glob(f"*.{ADAPTER_NAME}-*"):
        if old.name not in needed:
            shutil.rmtree(old, ignore_errors=True)
    return sealed
