"""Sealed folders: every file hashed, the table of hashes signed. Releases and published adapters are sealed folders.

`manifest.json` carries what the folder is (kind, schema version), the SHA-256 and size of every other file, the public
key and an Ed25519 signature over the canonical JSON (sorted keys, no white space) of all fields but the signature
itself. The SHA-256 of those same bytes is the folder's id.

Guarantees of `open_sealed`: nothing but the manifest is parsed before its signature holds; afterwards the folder
holds the listed files, byte for byte, and nothing else: no extra file, no symbolic link, no device or pipe, no path
that leaves the folder. With `trusted_key=None` it proves that the folder is whole, not who made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom_shared.errors import ReleaseError
from stillroom_shared.files import sync
from stillroom_shared.signing import SigningKey, verify

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_LARGEST_MANIFEST = 1 << 20
_AGAIN = "fetch it again from whoever publishes it"


class FileEntry(BaseModel):
    """Content hash and size of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class SealedManifest(BaseModel):
    """What every sealed folder states; subclasses add the fields of their kind.

    Attributes:
        kind: what the folder is; inside the signed bytes, so that one kind cannot pass for another.
        files: every file but the manifest, by path relative to the folder, with `/` between parts.
        public_key: the key that signed, 64 hexadecimal digits.
        signature: over `signed_bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    KIND: ClassVar[str]

    kind: str
    schema_version: int
    files: dict[str, FileEntry]
    public_key: str
    signature: str

    @cached_property
    def signed_bytes(self) -> bytes:
        """Canonical JSON of everything but the signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    @cached_property
    def id(self) -> str:
        """SHA-256 of the signed bytes: changes with any file, any field and the key."""
        return hashlib.sha256(self.signed_bytes).hexdigest()


Kind = TypeVar("Kind", bound=SealedManifest)


def canonical_json(fields: Mapping[str, Any]) -> bytes:
    """The one byte string that stands for these fields.

    >>> canonical_json({"b": [1, 2.5], "a": None})
    b'{"a":null,"b":[1,2.5]}'
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def seal(
    folder: Path,
    kind: type[Kind],
    fields: Mapping[str, Any],
    key: SigningKey,
    *,
    derived: Callable[[Mapping[str, FileEntry]], Mapping[str, str]] = lambda files: {},
) -> Kind:
    """Hash every file of `folder`, sign the table with the fields of this kind, and write the manifest.

    Args:
        derived: fields that follow from the table of hashes.
    """
    files = {name: _entry(path) for name, path in _regular_files(folder) if name != MANIFEST_NAME}
    body = {**fields, "kind": kind.KIND, "schema_version": SCHEMA_VERSION, "files": files, "public_key": key.public}
    try:
        unsigned = kind.model_validate({**body, **derived(files), "signature": ""})
        manifest = unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes)})
    except ValueError as error:  # pydantic's refusals, and numbers that JSON lacks
        raise ReleaseError(f"{folder} cannot be sealed as {kind.KIND}: {error}") from error
    (folder / MANIFEST_NAME).write_bytes(_rendered(manifest.model_dump(mode="json")))
    return manifest


def open_sealed(folder: Path, kind: type[Kind], *, trusted_key: str | None) -> Kind:
    """Verify signature and content of a sealed folder (see the module's guarantees); return its manifest.

    Raises:
        ReleaseError: naming the file that is missing, extra, altered or unsafe, or the key that is not trusted.
    """
    path = folder / MANIFEST_NAME
    fields, text = _read_manifest(path)
    if fields.get("kind") != kind.KIND:
        raise ReleaseError(f"{path} is of kind {fields.get('kind')!r}, not {kind.KIND!r}: name another folder")
    if (version := fields.get("schema_version")) != SCHEMA_VERSION:
        raise ReleaseError(
            f"{path} has schema version {version!r}, this Stillroom reads {SCHEMA_VERSION}: upgrade Stillroom, "
            f"or fetch a {kind.KIND} of that version"
        )
    _check_signature(path, fields, trusted_key)
    try:
        manifest = kind.model_validate_json(text)
    except ValidationError as error:
        raise ReleaseError(f"{path} is signed but malformed, {_AGAIN}: {error}") from error
    # Comparing bytes closes what JSON leaves open: repeated keys, other spellings of a number, white space.
    if _rendered(manifest.model_dump(mode="json")) != text:
        raise ReleaseError(f"{path} has been altered (it is not in the form that sealing writes): {_AGAIN}")
    _check_files(folder, manifest.files)
    return manifest


def read_verified(folder: Path, manifest: SealedManifest, name: str) -> bytes:
    """The content of one sealed file, hashed as it is read, so that what is used is what was signed."""
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise ReleaseError(f"{folder / name} has been altered since the folder was opened: {_AGAIN}")
    return data


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling to write into, made durable and renamed to `folder` at the end: torn folders never appear."""
    if folder.exists():
        raise ReleaseError(f"{folder} exists: sealed folders never change, choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        for root, _, names in os.walk(partial):
            for name in (*names, "."):
                sync(Path(root, name))
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when the rename succeeded


def _read_manifest(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > _LARGEST_MANIFEST:
            raise ReleaseError(f"{path} is not a regular file of at most {_LARGEST_MANIFEST} bytes: {_AGAIN}")
        text = path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror}): name a folder that was sealed") from error
    try:
        fields = json.loads(text)
        canonical_json(fields)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is not JSON that can be signed ({error}): {_AGAIN}") from error
    if not isinstance(fields, dict):
        raise ReleaseError(f"{path} is not a JSON object: {_AGAIN}")
    return fields, text


def _check_signature(path: Path, fields: Mapping[str, Any], trusted_key: str | None) -> None:
    public, signature = fields.get("public_key"), fields.get("signature")
    if not isinstance(public, str) or not isinstance(signature, str):
        raise ReleaseError(f"{path} is not signed: {_AGAIN}")
    if trusted_key is not None and public != trusted_key:
        raise ReleaseError(
            f"{path} is signed by key {public}, but the trusted key is {trusted_key}: {_AGAIN}, or ask its operator "
            "whether the key has changed"
        )
    body = {name: value for name, value in fields.items() if name != "signature"}
    if not verify(public, signature, canonical_json(body)):
        raise ReleaseError(f"{path} has been altered (its signature does not hold): {_AGAIN}")


def _check_files(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    for name in entries:
        if not _is_safe(name):
            raise ReleaseError(f"{folder / MANIFEST_NAME} lists the unsafe path {name!r}: do not use this folder")
    present = dict(_regular_files(folder))
    present.pop(MANIFEST_NAME, None)
    if missing := sorted(entries.keys() - present.keys()):
        raise ReleaseError(f"{folder / missing[0]} is missing: {_AGAIN}")
    if extra := sorted(present.keys() - entries.keys()):
        raise ReleaseError(f"{folder / extra[0]} does not belong to this folder: remove it, or {_AGAIN}")
    with ThreadPoolExecutor(2) as pool:  # hashing leaves the interpreter lock
        for name, found in zip(entries, pool.map(_entry, (present[name] for name in entries)), strict=True):
            if found != entries[name]:
                raise ReleaseError(f"{folder / name} has been altered (its content hash does not hold): {_AGAIN}")


def _is_safe(name: str) -> bool:
    """Whether a listed path is relative, normal and inside the folder on every platform."""
    path = PurePosixPath(name)
    plain = bool(path.parts) and not path.is_absolute() and str(path) == name and name != MANIFEST_NAME
    return plain and not {"..", "."} & set(path.parts) and not set(name) & set("\\:\0")


def _regular_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file; refuses links, devices and pipes: reading one could leave the folder."""
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ReleaseError(f"{path} is a link or a special file: replace it by its content, or {_AGAIN}")
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix(), path


def _entry(path: Path) -> FileEntry:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=file.tell())


def _rendered(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
