"""What releases and published adapters share: new folders appear whole, and an adapter is bound to one release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.sealing import SPEC, edit, make

from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ADAPTER_NAME, Release, open_adapter, open_release, seal_adapter
from stillroom_shared.sealed import new_folder
from stillroom_shared.signing import SigningKey


def test_torn_folder_never_appears(tmp_path: Path) -> None:
    """A crash while publishing must leave nothing under the release's name, and a finished one is never overwritten."""
    target = tmp_path / "releases" / "1"
    with pytest.raises(RuntimeError, match="crash"), new_folder(target) as partial:
        (partial / "half").write_text("x")
        assert not target.exists() and partial.parent == target.parent
        raise RuntimeError("crash")
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as partial:
        (partial / "whole").write_text("x")
    assert [path.name for path in target.parent.iterdir()] == ["1"] and (target / "whole").read_text() == "x"
    with pytest.raises(ReleaseError, match="never change"), new_folder(target):
        pass


@pytest.fixture
def release(tmp_path: Path, signing_key: SigningKey) -> Release:
    return open_release(make(tmp_path / "release", signing_key), trusted_key=None)


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(SPEC, np.arange(SPEC.size, dtype=np.float32))


@pytest.fixture
def published(release: Release, adapter: Adapter, signing_key: SigningKey, tmp_path: Path) -> Path:
    seal_adapter(
        tmp_path / "adapter", adapter, release_id=release.id, round=15, statement={"epsilon": 1.5}, key=signing_key
    )
    return tmp_path / "adapter"


def test_round_trip(release: Release, published: Path, adapter: Adapter, signing_key: SigningKey) -> None:
    """Values, round or statement lost on the way would apply, or claim, something that was not trained."""
    opened = open_adapter(published, release=release, trusted_key=signing_key.public)
    assert np.array_equal(opened.adapter.values, adapter.values) and opened.adapter.spec == SPEC
    assert (opened.release_id, opened.round, opened.statement) == (release.id, 15, {"epsilon": 1.5})


def test_other_release(release: Release, published: Path, signing_key: SigningKey, tmp_path: Path) -> None:
    """`B` trained on one tower makes another one worse, without any error."""
    other = open_release(make(tmp_path / "other", signing_key, adapter_round=1), trusted_key=None)
    with pytest.raises(ReleaseError, match="is for release"):
        open_adapter(published, release=other, trusted_key=signing_key.public)


def test_other_spec(release: Release, signing_key: SigningKey, tmp_path: Path) -> None:
    """An operator's mistake: an adapter of another rank or seed under the right release id."""
    wrong = Adapter.zero(replace(SPEC, seed=4))
    seal_adapter(tmp_path / "a", wrong, release_id=release.id, round=1, statement=None, key=signing_key)
    with pytest.raises(ReleaseError, match="has spec"):
        open_adapter(tmp_path / "a", release=release, trusted_key=signing_key.public)


def test_tampering(release: Release, published: Path, signing_key: SigningKey) -> None:
    """A device must not search with values that its operator did not publish."""
    with pytest.raises(ReleaseError, match="but the trusted key is"):
        open_adapter(published, release=release, trusted_key=SigningKey.generate().public)
    Adapter.zero(SPEC).save(published / ADAPTER_NAME)
    with pytest.raises(ReleaseError, match="has been altered"):
        open_adapter(published, release=release, trusted_key=signing_key.public)


def test_kinds_do_not_pass_for_each_other(release: Release, published: Path, signing_key: SigningKey) -> None:
    """One key signs releases and adapters: the kind must be inside what it signs."""
    with pytest.raises(ReleaseError, match="is of kind 'adapter', not 'release'"):
        open_release(published, trusted_key=signing_key.public)
    with pytest.raises(ReleaseError, match="is of kind 'release', not 'adapter'"):
        open_adapter(release.folder, release=release, trusted_key=signing_key.public)
    edit(published, lambda fields: fields.update(kind="release"))
    with pytest.raises(ReleaseError, match="signature does not hold"):
        open_release(published, trusted_key=signing_key.public)
