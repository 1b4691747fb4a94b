"""A device serves what its store holds, to its owner only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.client.devices import ANIMALS, adapter_folder, filled, passages, units

from stillroom_client.encoder import Encoder
from stillroom_client.search import Device, Hit
from stillroom_client.store import Change, Feedback
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey


def test_search_equals_brute_force_over_the_stored_vectors(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against vectors of the wrong tower, passages joined to the wrong vectors, and wrong ranks."""
    with Device.create(tmp_path / "home", tiny_release.folder) as device:
        assert device.add(passages(ANIMALS)) == Change(len(ANIMALS), 0, 0)
        encoder = Encoder(tiny_release, precision="int8")
        documents = encoder.encode_documents([p.full_text for p in passages(ANIMALS)])
        query = encoder.encode_queries(["which animal eats leaves"])[0]
        expected = sorted(zip(-(documents @ query), ANIMALS, strict=True))[:4]
        hits = device.search("which animal eats leaves", k=4, mode="dense")
        assert [hit.rank for hit in hits] == [1, 2, 3, 4]
        np.testing.assert_allclose([hit.score for hit in hits], [-score for score, _ in expected], atol=0.01)
        assert set(device.search_many(query[None], 10)[0]) == set(ANIMALS)
        for hit in hits:
            [passage] = passages([hit.passage_id])
            assert hit == Hit(
                hit.rank,
                hit.score,
                passage.id,
                passage.owner,
                passage.title,
                passage.text,
                hit.rank,
                None,
                "",
                hit.position,
                {"owner": "zoo"},
            )
        assert len(device.search("anything", k=99)) == len(ANIMALS)
        with pytest.raises(SettingsError, match="k = 0"):
            device.search("anything", k=0)


def test_only_new_and_changed_passages_are_embedded(
    tmp_path: Path, tiny_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against embedding a whole folder again because one file of it changed."""
    embedded: list[str] = []
    real = Encoder.encode_documents

    def spy(self: Encoder, texts: list[str]) -> NDArray[np.float32]:
        embedded.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(Encoder, "encode_documents", spy)
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.add(passages(["tapir", "okapi"]))
        embedded.clear()
        edited = passages(["tapir"]) + passages(["okapi"], text="The {} hides.") + passages(["saola"])
        assert device.add(edited) == Change(1, 1, 1)
        assert embedded == ["Animals\nThe okapi hides.", "Animals\nThe saola is an animal."]
        assert device.add(edited) == Change(0, 0, 3) and len(embedded) == 2


def test_an_empty_device_finds_nothing(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a crash of FAISS on an index that was never trained."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        assert device.search("anything") == [] and device.add([]) == Change(0, 0, 0)
        ids, vectors = device.candidates(units(2, tiny_release.dimension), 5)
        assert ids == [[], []] and vectors.shape == (2, 0, tiny_release.dimension)
        assert device.vectors_of([]).shape == (0, tiny_release.dimension)


def test_candidates_come_with_their_own_vectors(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against training records whose vectors belong to other passages."""
    with filled(tmp_path / "home", tiny_release, 50) as device:
        own, queries = units(50, tiny_release.dimension), units(3, tiny_release.dimension, seed=1)
        ids, vectors = device.candidates(queries, 7)
        assert vectors.shape == (3, 7, tiny_release.dimension) and vectors.dtype == np.float32
        for row, names in enumerate(ids):
            expected = np.argsort(-(own @ queries[row]))[:7]
            assert len(set(names) & {f"p{n}" for n in expected}) >= 6
            np.testing.assert_allclose(vectors[row], own[[int(name[1:]) for name in names]], atol=1 / 254)
            np.testing.assert_array_equal(device.vectors_of(names), vectors[row])
        assert device.candidates(queries, 99)[1].shape == (3, 50, tiny_release.dimension)
        np.testing.assert_array_equal(device.vectors_of(["p3", "p3"])[0], device.vectors_of(["p3"])[0])
        with pytest.raises(DataError, match="'p50' is not in this index"):
            device.vectors_of(["p3", "p50"])


def test_one_query_does_not_change_the_candidates_of_another(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against records that depend on other records: per-record sensitivity would be unsound."""
    with filled(tmp_path / "home", tiny_release) as device:
        queries = units(9, tiny_release.dimension, seed=1)
        together = device.candidates(queries, 5)
        for row in range(9):
            alone = device.candidates(queries[row : row + 1], 5)
            assert alone[0][0] == together[0][row]
            np.testing.assert_array_equal(alone[1][0], together[1][row])


def test_a_home_is_readable_by_its_owner_only(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> None:
    """Guards against other accounts of a shared machine that read documents, queries or vectors."""
    before = os.umask(0)
    try:
        with Device.create(tmp_path / "home", tiny_release.folder) as device:
            device.add(passages(["tapir"]))
            device.adopt(adapter_folder(tmp_path / "one", tiny_release, signing_key))
            device.search("tapir")
            for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")):
                if not path.is_symlink():
                    assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    finally:
        os.umask(before)


def test_homes_are_made_once_and_unknown_ones_are_named(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against documents that vanish because a home was made anew over them."""
    home = tmp_path / "my home"
    home.mkdir()
    Device.create(home, tiny_release, link=True).close()
    with pytest.raises(DataError, match="exists and is not empty"):
        Device.create(home, tiny_release, link=True)
    assert Device.name_of(home) == "my home"
    Device.create(tmp_path / "other", tiny_release, link=True, name="other device").close()
    assert Device.name_of(tmp_path / "other") == "other device"
    for use in (Device.open, Device.name_of):
        with pytest.raises(DataError, match=r"nowhere is not the home of a device: .* --home .*nowhere --release"):
            use(tmp_path / "nowhere")
    identity = json.loads((home / "device.json").read_text())
    for broken in ("{", json.dumps(identity | {"colour": "red"}), json.dumps(identity | {"schema_version": 2})):
        (home / "device.json").write_text(broken)
        with pytest.raises(DataError, match=r"device\.json cannot be read"):
            Device.open(home)


def test_feedback_is_what_was_opened(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against training on what was merely shown, or on passages that are gone."""
    with filled(tmp_path / "home", tiny_release, 3) as device:
        device.record([("who eats leaves", "p1"), Feedback("who swims", "p2")])
        assert device.feedback() == [("who eats leaves", "p1"), ("who swims", "p2")]
        device.remove(["p1"])
        assert [passage for _, passage in device.feedback()] == ["p2"]
        assert device.erase_feedback() == 1 and device.feedback() == []
