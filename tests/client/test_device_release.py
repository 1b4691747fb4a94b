"""A device uses a release or an adapter only while everything about it verifies."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.devices import ANIMALS, adapter_folder, filled, passages, units, unpacked

from stillroom_client.device import Device
from stillroom_client.store import Change
from stillroom_shared.errors import DataError, ReleaseError
from stillroom_shared.release import Release, seal_release
from stillroom_shared.signing import SigningKey


def test_vectors_need_no_release_and_search_needs_a_sound_one(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against hashing a release for each of a thousand devices, and against skipping it when it matters."""
    folder = unpacked(tiny_release, tmp_path / "release")
    with filled(tmp_path / "home", Release(folder, tiny_release.manifest)) as device:
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
        assert device.add(passages(["new"]), units(1, tiny_release.dimension, seed=3)) == Change(1, 0, 0)
        assert device.search_many(units(1, tiny_release.dimension), 1) == [["p0"]]
        for use in (lambda: device.search("x"), lambda: device.add(passages(["other"])), lambda: device.release):
            with pytest.raises(ReleaseError, match=r"tokenizer\.json has been altered"):
                use()
        assert not device.has("other") and device.has("new")


@pytest.mark.parametrize("link", [True, False])
def test_a_tampered_release_makes_no_device(tmp_path: Path, tiny_release: Release, link: bool) -> None:
    """Guards against a device that indexes with a release nobody vouches for, and against half a home."""
    folder = unpacked(tiny_release, tmp_path / "release")
    (folder / "extra.py").write_text("print('run me')")
    with pytest.raises(ReleaseError, match=r"extra\.py does not belong"):
        Device.create(tmp_path / "home", folder, link=link)
    other = SigningKey.generate().public
    for release in (tiny_release, tiny_release.folder):
        with pytest.raises(ReleaseError, match=f"trusted key is {other}"):
            Device.create(tmp_path / "home", release, trusted_key=other, link=link)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_the_first_key_is_pinned(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a later release by anybody, on a device that was made without naming a key."""
    with Device.create(tmp_path / "home", tiny_release.folder) as device:
        assert device.identity.trusted_key == tiny_release.manifest.public_key
    resealed(tmp_path / "home" / "release", tiny_release, SigningKey.generate())
    with Device.open(tmp_path / "home") as device, pytest.raises(ReleaseError, match="trusted key"):
        device.search("x")


def resealed(folder: Path, release: Release, key: SigningKey, **changes: Any) -> None:
    computed = {"files", "public_key", "signature", "kind", "schema_version", "query_tower_hash", "document_tower_hash"}
    fields = release.manifest.model_dump(exclude=computed) | {"adapter_spec": release.adapter_spec} | changes
    seal_release(folder, fields, key)


def test_a_release_with_another_document_tower_is_refused(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Guards against comparing queries of one space with documents of another: every result would be noise."""
    home = tmp_path / "home"
    with Device.create(home, tiny_release.folder) as device:
        device.add(passages(["tapir"]), units(1, tiny_release.dimension))
    resealed(home / "release", tiny_release, signing_key, query_tokens=tiny_release.query_tokens - 1)
    with Device.open(home) as device:
        assert len(device.search("a new query tower is welcome")) == 1
    resealed(home / "release", tiny_release, signing_key, document_tokens=tiny_release.document_tokens - 1)
    with Device.open(home) as device, pytest.raises(ReleaseError, match=r"document tower .* index upgrade"):
        device.search("tapir")


def test_an_adapter_changes_queries_and_stays(tmp_path: Path, tiny_release: Release, signing_key: SigningKey) -> None:
    """Guards against an adapter that is verified and ignored, or forgotten at the next start."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        before = device.encoder.encode_queries(["a tapir"])
        assert device.adapter is None
        sealed = device.adopt(adapter_folder(tmp_path / "one", tiny_release, signing_key))
        after = device.encoder.encode_queries(["a tapir"])
        assert np.abs(before - after).max() > 0.001 and sealed.round == 1
    shutil.rmtree(tmp_path / "one")
    with Device.open(tmp_path / "home") as device:
        np.testing.assert_array_equal(device.encoder.encode_queries(["a tapir"]), after)
        for round in (2, 3, 4):
            device.adopt(adapter_folder(tmp_path / f"{round}", tiny_release, signing_key, round=round))
            assert device.adapter is not None and device.adapter.round == round
        assert len(list((tmp_path / "home").glob("*adapter*"))) == 3  # the link, the one in use, the one before


def test_an_adapter_that_another_process_adopts_is_used_from_the_next_query_on(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Guards against a server that searches with the adapter of its start until somebody restarts it."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as device, Device.open(device.home) as other:
        device.add(passages(ANIMALS))
        scores = []
        for round in (0, 1, 2):
            if round:
                device.adopt(adapter_folder(tmp_path / f"{round}", tiny_release, signing_key, round=round))
            found = [[hit.score for hit in some.search("a tapir", 5, mode="dense")] for some in (device, other)]
            assert found[0] == found[1]
            scores.append(found[0])
        assert scores[0] != scores[1] != scores[2]


def test_an_adapter_that_does_not_verify_changes_nothing(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Guards against an attacker's adapter that steers what a device finds."""
    good, forged, altered = (tmp_path / name for name in ("good", "forged", "altered"))
    adapter_folder(good, tiny_release, signing_key)
    adapter_folder(forged, tiny_release, SigningKey.generate(), round=2)
    adapter_folder(altered, tiny_release, signing_key, round=3)
    weights = altered / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with Device.create(tmp_path / "home", tiny_release, link=True) as device:
        device.adopt(good)
        vectors, files = device.encoder.encode_queries(["a tapir"]), sorted((tmp_path / "home").rglob("*"))
        for bad, message in ((forged, "trusted key"), (altered, "altered"), (tmp_path / "nowhere", "nowhere")):
            with pytest.raises((ReleaseError, DataError), match=message):
                device.adopt(bad)
        np.testing.assert_array_equal(device.encoder.encode_queries(["a tapir"]), vectors)
        assert sorted((tmp_path / "home").rglob("*")) == files
        assert device.adapter is not None and device.adapter.round == 1


def test_what_is_kept_is_what_was_verified(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against files that change between the check and the copy: the copy is what the device will use."""
    published = adapter_folder(tmp_path / "one", tiny_release, signing_key)
    device = Device.create(tmp_path / "home", tiny_release, link=True)
    real = shutil.copyfile

    def altering(source: str, target: str, **options: Any) -> None:
        real(source, target, **options)
        if target.endswith(".safetensors"):
            with open(target, "ab") as file:
                file.write(b" ")

    monkeypatch.setattr(shutil, "copyfile", altering)
    with pytest.raises(ReleaseError, match="altered"):
        Device.create(tmp_path / "copied", tiny_release)
    with pytest.raises(ReleaseError, match="altered"):
        device.adopt(published)
    assert not (tmp_path / "copied").exists() and device.adapter is None
    device.close()


_ADOPTER = """
import os, pathlib, signal, sys
from stillroom_client.device import Device
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
device, moment = Device.open(pathlib.Path(sys.argv[1])), sys.argv[3]
device.release
setattr(pathlib.Path, {"copy": "rename", "swap": "replace"}[moment], kill)
device.adopt(pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", ["copy", "swap"])
def test_sigkill_while_adopting_keeps_the_old_adapter(
    tmp_path: Path, tiny_release: Release, signing_key: SigningKey, moment: str
) -> None:
    """Guards against a device that cannot search any more after a crash, and against leftovers that pile up."""
    home, one, two = (tmp_path / name for name in ("home", "one", "two"))
    with Device.create(home, tiny_release, link=True) as device:
        device.adopt(adapter_folder(one, tiny_release, signing_key, round=1))
    adapter_folder(two, tiny_release, signing_key, round=2)
    command = [sys.executable, "-c", _ADOPTER, str(home), str(two), moment]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Device.open(home) as device:
        assert device.adapter is not None and device.adapter.round == 1
        device.adopt(two)
        assert device.adapter.round == 2
    assert len(list(home.glob("*adapter*"))) == 3 and not list(home.glob("*partial*"))


def test_a_linked_release_moves_along(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against absolute links: a run's folder could not be moved or copied."""
    unpacked(tiny_release, tmp_path / "run" / "release")
    source = Release(tmp_path / "run" / "release", tiny_release.manifest)
    Device.create(tmp_path / "run" / "devices" / "d", source, link=True).close()
    (tmp_path / "run").rename(tmp_path / "moved")
    with Device.open(tmp_path / "moved" / "devices" / "d") as device:
        assert device.release.id == tiny_release.id
        assert device.release.folder == (tmp_path / "moved" / "release").resolve()
