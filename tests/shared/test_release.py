"""Releases: what is accepted, and every way of tampering that must be refused.

Tampering with the file table needs no towers, so most tests seal a folder of small files; `tiny_release` is a real one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.sealing import FIELDS, NAMES, SPEC, edit, make, refused

from stillroom_shared import sealed
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import (
    DOCUMENT_FOLDER,
    ONNX_FILES,
    TOKENIZER_NAME,
    Manifest,
    Release,
    open_release,
    seal_release,
)
from stillroom_shared.sealed import MANIFEST_NAME
from stillroom_shared.signing import SigningKey


@pytest.fixture
def folder(tmp_path: Path, signing_key: SigningKey) -> Path:
    return make(tmp_path / "release", signing_key)


def test_round_trip(folder: Path, signing_key: SigningKey) -> None:
    """A field lost between sealing and opening would be missing on every device."""
    release = open_release(folder, trusted_key=signing_key.public)
    manifest = release.manifest
    assert (release.dimension, release.query_tokens, release.document_tokens) == (8, 32, 256)
    assert release.adapter_spec == SPEC and manifest.matryoshka_dimensions == ()
    assert manifest.privacy_statement == FIELDS["privacy_statement"]
    assert (manifest.parent, manifest.adapter_round, manifest.public_key) == (None, 0, signing_key.public)
    assert release.read(release.query_onnx("int8")) == ONNX_FILES["int8"].encode()
    assert release.read(release.document_onnx("float32")) == f"{DOCUMENT_FOLDER}/{ONNX_FILES['float32']}".encode()
    assert release.tokenizer_file.read_text() == "tokenizer"
    assert open_release(folder, trusted_key=None) == release


def test_id_covers_files_fields_and_key(tmp_path: Path, signing_key: SigningKey) -> None:
    """Two releases with one id would let an adapter for one be applied to the other."""
    ids = [open_release(make(tmp_path / "a", signing_key), trusted_key=None).id]
    assert open_release(make(tmp_path / "same", signing_key), trusted_key=None).id == ids[0]
    ids.append(open_release(make(tmp_path / "b", signing_key, adapter_round=1), trusted_key=None).id)
    ids.append(open_release(make(tmp_path / "c", SigningKey.generate()), trusted_key=None).id)
    other = make(tmp_path / "d", signing_key)
    (other / ONNX_FILES["int8"]).write_text("other weights")
    seal_release(other, FIELDS, signing_key)
    ids.append(open_release(other, trusted_key=None).id)
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("changed", "query_moves", "document_moves"),
    [
        (ONNX_FILES["int8"], True, False),
        (f"{DOCUMENT_FOLDER}/{ONNX_FILES['float32']}", False, True),
        (TOKENIZER_NAME, True, True),
        ("query_tokens", True, False),
        ("document_tokens", False, True),
        ("adapter_round", False, False),
    ],
)
def test_tower_hashes_follow_what_vectors_depend_on(
    folder: Path, signing_key: SigningKey, changed: str, query_moves: bool, document_moves: bool
) -> None:
    """A hash that misses a change would search an index built by another tower; one that moves too much re-embeds."""
    before, fields = open_release(folder, trusted_key=None).manifest, dict(FIELDS)
    if changed in fields:
        fields[changed] = 17
    else:
        (folder / changed).write_text("changed")
        if changed == TOKENIZER_NAME:
            (folder / DOCUMENT_FOLDER / changed).write_text("changed")
    after = seal_release(folder, fields, signing_key)
    assert (after.query_tower_hash != before.query_tower_hash) is query_moves
    assert (after.document_tower_hash != before.document_tower_hash) is document_moves


@pytest.mark.parametrize("name", NAMES)
def test_altered_file(folder: Path, signing_key: SigningKey, name: str) -> None:
    """One flipped bit in a tower can be a backdoor; same length, so the size alone would not show it."""
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, f"{name} has been altered", key=signing_key.public)


def test_missing_file(folder: Path, signing_key: SigningKey) -> None:
    """A torn copy must not open and then fail at the first query."""
    (folder / ONNX_FILES["int8"]).unlink()
    refused(folder, f"{ONNX_FILES['int8']} is missing", key=signing_key.public)


@pytest.mark.parametrize("name", ["extra.py", "onnx/model_quantized.onnx", ".hidden", "onnx/manifest.json"])
def test_extra_file(folder: Path, signing_key: SigningKey, name: str) -> None:
    """A loader may prefer a file that was added (another ONNX name, a Python module) to the signed one."""
    (folder / name).write_text("x")
    refused(folder, f"{name} does not belong", key=signing_key.public)


def test_no_manifest(tmp_path: Path) -> None:
    """A folder without a manifest must not count as a release without files."""
    refused(tmp_path, "cannot be read", key=None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a": 1e999}', b"1"])
def test_manifest_that_is_no_json_object(folder: Path, content: bytes) -> None:
    """Parser errors of any sort must become refusals: an escaping exception is a crash an attacker can choose."""
    (folder / MANIFEST_NAME).write_bytes(content)
    refused(folder, "JSON", key=None)


def test_huge_manifest(folder: Path) -> None:
    """The manifest is read before anything is verified; it must not be able to exhaust memory."""
    (folder / MANIFEST_NAME).write_bytes(b" " * (2 << 20))
    refused(folder, "regular file of at most", key=None)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_unknown_schema_version(folder: Path, signing_key: SigningKey, version: object) -> None:
    """A later format read with today's meaning could skip what it added, a revocation for instance."""
    edit(folder, lambda fields: fields.update(schema_version=version), signing_key)
    refused(folder, "schema version", key=signing_key.public)


@pytest.mark.parametrize(
    "change",
    [
        {"adapter_round": 7},
        {"privacy_statement": None},
        {"document_tower_hash": "0" * 64},
        {"signature": "00" * 64},
        {"added": 1},
        {"query_tokens": 31},
    ],
)
def test_altered_manifest(folder: Path, signing_key: SigningKey, change: dict[str, object]) -> None:
    """A privacy statement or a round number that can be edited after signing states nothing."""
    edit(folder, lambda fields: fields.update(change))
    for key in (signing_key.public, None):
        refused(folder, "its signature does not hold", key=key)


def test_manifest_without_signature(folder: Path, signing_key: SigningKey) -> None:
    """An absent signature must not be taken for one that need not be checked."""
    for absent in ("signature", "public_key"):
        edit(folder, lambda fields, name=absent: fields.pop(name))  # type: ignore[misc]
        refused(folder, "is not signed", key=None)
        edit(folder, lambda fields, name=absent: fields.update({name: None}))  # type: ignore[misc]
        refused(folder, "is not signed", key=None)


def test_other_key(folder: Path, signing_key: SigningKey) -> None:
    """Anybody can sign a manifest; only the operator's signature counts where a trusted key is given."""
    stranger = SigningKey.generate()
    edit(folder, lambda fields: fields.update(adapter_round=3), stranger)
    words = f"signed by key {stranger.public}, but the trusted key is {signing_key.public}"
    refused(folder, words, key=signing_key.public)
    assert open_release(folder, trusted_key=None).manifest.adapter_round == 3
    # A stranger's signature under the operator's name.
    edit(folder, lambda fields: fields.update(public_key=signing_key.public))
    refused(folder, "signature does not hold", key=signing_key.public)


def test_same_content_in_other_bytes(folder: Path, signing_key: SigningKey) -> None:
    """A repeated key means one thing to us and another to another parser, under one signature."""
    path = folder / MANIFEST_NAME
    text = path.read_text()
    for other in (text + " ", text.replace("{", '{"adapter_round": 5,', 1), json.dumps(json.loads(text))):
        path.write_text(other)
        refused(folder, "has been altered", key=signing_key.public)


UNSAFE = ["../outside", "/etc/hostname", "onnx/../../outside", "./x", "a//b", "", ".", "..", "onnx\\x", "C:x", "a\0b"]


@pytest.mark.parametrize("name", [*UNSAFE, MANIFEST_NAME])
def test_unsafe_path(folder: Path, signing_key: SigningKey, name: str) -> None:
    """Even a signed manifest must not make a device read outside the release folder."""
    (folder.parent / "outside").write_text("secret")
    entry = sealed._entry(folder.parent / "outside").model_dump()
    edit(folder, lambda fields: fields["files"].update({name: entry}), signing_key)
    refused(folder, "unsafe path", key=signing_key.public)


@pytest.mark.parametrize("name", [ONNX_FILES["int8"], "onnx", MANIFEST_NAME, "added"])
def test_symbolic_link(folder: Path, signing_key: SigningKey, name: str) -> None:
    """A link whose target has the right hash now can point anywhere later, outside the folder included."""
    outside = folder.parent / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("x")
    (folder / name).symlink_to(outside)
    refused(folder, "link or a special file|not a regular file", key=signing_key.public)


def test_pipe(folder: Path, signing_key: SigningKey) -> None:
    """Reading a named pipe would hang the device."""
    (folder / TOKENIZER_NAME).unlink()
    os.mkfifo(folder / TOKENIZER_NAME)
    refused(folder, "special file", key=signing_key.public)


def test_linked_release_folder_opens(folder: Path, signing_key: SigningKey) -> None:
    """The folder itself may be reached through a link (`current -> 7`); refusing that would break deployments."""
    link = folder.parent / "current"
    link.symlink_to(folder)
    assert open_release(link, trusted_key=signing_key.public).folder == folder.resolve()


def test_nothing_is_read_before_the_signature_holds(
    folder: Path, signing_key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing unsigned content is where parsers get attacked; the order of checks is the boundary."""

    def forbidden(*_: object) -> None:
        raise AssertionError("content was touched before the signature was verified")

    edit(folder, lambda fields: fields.update(adapter_round=9))
    for name in ("_entry", "_regular_files"):
        monkeypatch.setattr(sealed, name, forbidden)
    monkeypatch.setattr(Manifest, "model_validate_json", forbidden)
    refused(folder, "signature does not hold", key=signing_key.public)


def test_signed_but_inconsistent(folder: Path, signing_key: SigningKey) -> None:
    """A stated tower hash that the files do not give would make a device keep a wrong index, or drop a right one."""
    edit(folder, lambda fields: fields.update(document_tower_hash="0" * 64), signing_key)
    refused(folder, "does not follow from its files", key=signing_key.public)


def test_two_tokenizers_are_refused(folder: Path, signing_key: SigningKey) -> None:
    """Devices load one tokenizer; a second one in the folder would be ignored in silence."""
    (folder / DOCUMENT_FOLDER / TOKENIZER_NAME).write_text("another")
    with pytest.raises(ReleaseError, match="different tokenizers"):
        seal_release(folder, FIELDS, signing_key)


def test_incomplete_release_is_not_sealed(folder: Path, signing_key: SigningKey) -> None:
    """Sealing a release without its int8 file would move the failure to every device."""
    (folder / ONNX_FILES["int8"]).unlink()
    with pytest.raises(ReleaseError, match=f"lacks {ONNX_FILES['int8']}"):
        seal_release(folder, FIELDS, signing_key)


@pytest.mark.parametrize("change", [{"dimension": 0}, {"adapter_round": -1}, {"unknown": 1}, {"query_tokens": "32"}])
def test_fields_out_of_range_are_not_sealed(folder: Path, signing_key: SigningKey, change: dict[str, object]) -> None:
    """Strict fields: a text where a number belongs would be read differently by whoever is less strict."""
    with pytest.raises(ReleaseError, match=next(iter(change))):
        seal_release(folder, {**FIELDS, **change}, signing_key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_not_sealed(folder: Path, signing_key: SigningKey, value: float) -> None:
    """An infinite epsilon written as `null` would read as "nothing was spent"."""
    with pytest.raises(ReleaseError, match="cannot be sealed"):
        seal_release(folder, {**FIELDS, "privacy_statement": {"epsilon": value}}, signing_key)


def test_file_altered_after_opening(folder: Path, signing_key: SigningKey) -> None:
    """Between opening and loading, another process could exchange the tower."""
    release = open_release(folder, trusted_key=signing_key.public)
    (folder / ONNX_FILES["int8"]).write_text("exchanged")
    with pytest.raises(ReleaseError, match="since the folder was opened"):
        release.read(release.query_onnx("int8"))


def test_real_release_opens_and_refuses_tampering(
    tiny_release: Release, signing_key: SigningKey, tmp_path: Path
) -> None:
    """The sealed towers of a real release are covered, not only the small files of these tests."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_release.folder, copy)
    assert open_release(copy, trusted_key=signing_key.public).id == tiny_release.id
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    refused(copy, "model.safetensors has been altered", key=signing_key.public)
