"""The two values an operator publishes: a release (both towers), and an adapter for it.

A release is a folder that is a Sentence Transformers model: the query tower at its root, the document tower in
`document/`, ONNX files where that library's `backend="onnx"` looks for them, and the manifest that seals it (see
`sealed.py`). It may bring a cross-encoder in `reranker/`, which the manifest's table of files covers and no field of it names:
versions before rerankers verify such a release and leave that folder unused.

In the query tower's ONNX files the matrices `B` of the adapter are overridable initializers: graph inputs with a
default value, named `adapter.layer.0.query` and so on. A plain loader ignores them; a device feeds another adapter at
run time without exporting again. The torch weights hold the same adapter merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.errors import ReleaseError
from stillroom_shared.heads import Position
from stillroom_shared.sealed import (
    FileEntry,
    SealedManifest,
    canonical_json,
    new_folder,
    open_sealed,
    read_verified,
    seal,
)
from stillroom_shared.signing import SigningKey

Precision = Literal["int8", "float32"]
# The names Sentence Transformers gives these files; the int8 file runs on any CPU, the name only says what it was
# made for.
ONNX_FILES: Mapping[Precision, str] = {
    "float32": "onnx/model.onnx",
    "int8": "onnx/model_qint8_avx512_vnni.onnx",
}
DOCUMENT_FOLDER = "document"
TOKENIZER_NAME = "tokenizer.json"
ADAPTER_NAME = "adapter.safetensors"
RERANKER_FOLDER = "reranker"
RERANKER_SETTINGS = "reranker.json"
SOURCES_NAME = "sources.json"
"""Which public text the towers learned from; a release without it does not say."""
ADAPTER_INPUT = "adapter."  # prefix of the overridable initializers' names


class RerankerSettings(BaseModel):
    """Content of `reranker/reranker.json`.

    Attributes:
        tokens: of a query and a passage together that are read, special tokens included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    tokens: int = Field(ge=8)


class Manifest(SealedManifest):
    """What a release states about itself.

    Attributes:
        dimension: length of the vectors of both towers.
        matryoshka_dimensions: shorter prefixes of a vector that may be compared; empty when there are none.
        query_tokens: tokens of a query that are read; longer queries are truncated.
        document_tokens: the same for a passage.
        query_tower_hash: identifies what query vectors depend on.
        document_tower_hash: identifies what document vectors, and so an index, depend on. A round leaves it alone.
        parent: id of the release this one was trained from, or None.
        adapter_round: federated rounds that led to this release's adapter; 0 before the first.
        adapter_spec: the adapters that fit this release.
        privacy_statement: what the rounds spent, as the statement's own fields, or None when there were none.
    """

    KIND: ClassVar[str] = "release"

    kind: Literal["release"]
    dimension: int = Field(gt=0)
    matryoshka_dimensions: tuple[int, ...] = ()
    query_tokens: int = Field(gt=2)
    document_tokens: int = Field(gt=2)
    query_tower_hash: str
    document_tower_hash: str
    parent: str | None
    adapter_round: int = Field(ge=0)
    adapter_spec: AdapterSpec
    privacy_statement: dict[str, JsonValue] | None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for folder, tokens, stated in (
            ("", self.query_tokens, self.query_tower_hash),
            (f"{DOCUMENT_FOLDER}/", self.document_tokens, self.document_tower_hash),
        ):
            if _tower_hash(self.files, folder, tokens) != stated:
                raise ValueError(f"the hash of the tower in {folder or 'the root'!r} does not follow from its files")
        if self.files[TOKENIZER_NAME] != self.files[f"{DOCUMENT_FOLDER}/{TOKENIZER_NAME}"]:
            raise ValueError("the two towers have different tokenizers; one must serve both")
        needed = [f"{RERANKER_FOLDER}/{name}" for name in (ONNX_FILES["int8"], TOKENIZER_NAME, RERANKER_SETTINGS)]
        missing = [name for name in needed if name not in self.files]
        if missing and any(name.startswith(f"{RERANKER_FOLDER}/") for name in self.files):
            raise ValueError(f"the release has a reranker without {missing[0]}")
        lengths = list(self.matryoshka_dimensions)
        if lengths != sorted(set(lengths)) or not all(0 < length < self.dimension for length in lengths):
            raise ValueError(f"matryoshka_dimensions {lengths}: ascending lengths below {self.dimension} are wanted")
        return self


@dataclass(frozen=True)
class Release:
    """A verified release. Made by `open_release` only, so that holding one means that its checks passed."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """SHA-256 of the manifest: names this release in adapters and in its children."""
        return self.manifest.id

    @property
    def adapter_spec(self) -> AdapterSpec:
        """The adapters that fit this release."""
        return self.manifest.adapter_spec

    @property
    def document_tower_hash(self) -> str:
        """What an index must have been built with to be searched with this release."""
        return self.manifest.document_tower_hash

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.manifest.dimension

    @property
    def matryoshka_dimensions(self) -> tuple[int, ...]:
        """Shorter lengths at which vectors may be compared; none if it was not trained for any."""
        return self.manifest.matryoshka_dimensions

    @property
    def query_tokens(self) -> int:
        """Tokens of a query that are read."""
        return self.manifest.query_tokens

    @property
    def document_tokens(self) -> int:
        """Tokens of a passage that are read."""
        return self.manifest.document_tokens

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of both towers, in the format of the `tokenizers` library."""
        return self.folder / TOKENIZER_NAME

    def query_onnx(self, precision: Precision) -> Path:
        """The query tower's ONNX file."""
        return self.folder / ONNX_FILES[precision]

    def document_onnx(self, precision: Precision) -> Path:
        """The document tower's ONNX file."""
        return self.folder / DOCUMENT_FOLDER / ONNX_FILES[precision]

    @property
    def has_reranker(self) -> bool:
        """Whether it brings a cross-encoder that reads the best results again."""
        return f"{RERANKER_FOLDER}/{RERANKER_SETTINGS}" in self.manifest.files

    @property
    def sources(self) -> list[dict[str, Any]] | None:
        """Names of the public text that the towers learned from, with what is known about each; None where nobody says."""
        if SOURCES_NAME not in self.manifest.files:
            return None
        try:
            said = json.loads(self.read(self.folder / SOURCES_NAME))["sources"]
            return None if said is None else [{"name": str(one["name"]), "facts": dict(one["facts"])} for one in said]
        except (KeyError, TypeError, ValueError) as error:
            raise ReleaseError(f"{self.folder / SOURCES_NAME} cannot be read ({error!r}): upgrade Stillroom") from error

    def read(self, path: Path) -> bytes:
        """Content of one of this release's files, verified again as it is read."""
        return read_verified(self.folder, self.manifest, path.relative_to(self.folder).as_posix())


def open_release(folder: Path, *, trusted_key: str | None) -> Release:
    """Verify a release and return it: schema, signature, every hash, no missing, extra or unsafe file.

    Args:
        trusted_key: the operator's public key; None proves that the release is whole, not whose it is.

    Raises:
        ReleaseError: naming the file and the remedy.
    """
    folder = folder.resolve()
    return Release(folder, open_sealed(folder, Manifest, trusted_key=trusted_key))


def seal_release(folder: Path, fields: Mapping[str, Any], key: SigningKey) -> Manifest:
    """Write the manifest of a release folder whose files are in place; tower hashes are computed here.

    Args:
        fields: `Manifest` fields other than hashes, files, key and signature.
    """
    return seal(
        folder,
        Manifest,
        fields,
        key,
        derived=lambda files: {
            "query_tower_hash": _tower_hash(files, "", fields["query_tokens"]),
            "document_tower_hash": _tower_hash(files, f"{DOCUMENT_FOLDER}/", fields["document_tokens"]),
        },
    )


class AdapterManifest(SealedManifest):
    """What a published adapter states: which release it fits, how many rounds it took, what they spent.

    `ledger` is where the coordinator's ledger stood; it is left out where there is none, as in adapters from before it.
    """

    KIND: ClassVar[str] = "adapter"

    kind: Literal["adapter"]
    release_id: str
    round: int = Field(ge=0)
    statement: dict[str, JsonValue] | None
    ledger: Position | None = None

    @model_serializer(mode="wrap")
    def _without_an_absent_ledger(self, rendered: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = rendered(self)
        return {name: value for name, value in fields.items() if name != "ledger" or value is not None}


@dataclass(frozen=True)
class SealedAdapter:
    """A verified adapter. `release_id` names the release it was trained on; on another its values mean nothing."""

    adapter: Adapter
    release_id: str
    round: int
    statement: Mapping[str, JsonValue] | None


def seal_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    release_id: str,
    round: int,
    statement: Mapping[str, Any] | None,
    key: SigningKey,
    ledger: Position | None = None,
) -> SealedAdapter:
    """Publish an adapter as a folder of its own: tens of kilobytes, signed, bound to one release."""
    stated = None if statement is None else dict(statement)
    fields = {"release_id": release_id, "round": round, "statement": stated, "ledger": ledger}
    with new_folder(folder) as partial:
        adapter.save(partial / ADAPTER_NAME)
        manifest = seal(partial, AdapterManifest, fields, key)
    return SealedAdapter(adapter, manifest.release_id, manifest.round, manifest.statement)


def open_adapter(folder: Path, *, release: Release, trusted_key: str | None) -> SealedAdapter:
    """Verify a published adapter against the release it is to be applied to.

    Raises:
        ReleaseError: it is altered, signed by another key, for another release, or of another spec.
    """
    folder = folder.resolve()
    manifest = open_sealed(folder, AdapterManifest, trusted_key=trusted_key)
    if manifest.release_id != release.id:
        raise ReleaseError(
            f"the adapter in {folder} is for release {manifest.release_id}, this device has {release.id}: "
            "fetch the adapter of your release, or that release"
        )
    adapter = Adapter.load(folder / ADAPTER_NAME)
    if adapter.spec != release.adapter_spec:
        raise ReleaseError(
            f"the adapter in {folder} has spec {adapter.spec}, release {release.id} takes {release.adapter_spec}: "
            "fetch it again from whoever publishes it"
        )
    return SealedAdapter(adapter, manifest.release_id, manifest.round, manifest.statement)


def _tower_hash(files: Mapping[str, FileEntry], folder: str, tokens: int) -> str:
    """SHA-256 over what a device's vectors depend on: the ONNX files, the tokenizer, and where it truncates."""
    names: Iterable[str] = (*ONNX_FILES.values(), TOKENIZER_NAME)
    if missing := [name for name in names if folder + name not in files]:
        raise ValueError(f"the release lacks {folder + missing[0]}")
    content = {name: files[folder + name].sha256 for name in names}
    return hashlib.sha256(canonical_json({"files": content, "tokens": tokens})).hexdigest()
