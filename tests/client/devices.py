"""What tests of a device need: passages, vectors, a filled device, a published adapter, a release to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillroom_client.device import Device
from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release, seal_adapter
from stillroom_shared.signing import SigningKey

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = ["tapir", "okapi", "numbat", "quokka", "axolotl", "pangolin", "aardvark", "dugong", "kakapo", "saola"]


def passages(names: list[str], text: str = "The {} is an animal.") -> list[Passage]:
    return [Passage(name, "zoo", text.format(name), "Animals") for name in names]


def units(count: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def filled(home: Path, release: Release, count: int = 300) -> Device:
    """A device with passages p0, p1, ... whose vectors are `units(count)`."""
    device = Device.create(home, release, link=True)
    device.add(passages([f"p{n}" for n in range(count)]), units(count, release.dimension))
    return device


def adapter_folder(folder: Path, release: Release, key: SigningKey, *, scale: float = 0.5, round: int = 1) -> Path:
    values = np.random.default_rng(round).standard_normal(release.adapter_spec.size).astype(np.float32) * scale
    adapter = Adapter(release.adapter_spec, values)
    seal_adapter(folder, adapter, release_id=release.id, round=round, statement=None, key=key)
    return folder


def unpacked(release: Release, folder: Path) -> Path:
    """A copy of a release to damage."""
    shutil.copytree(release.folder, folder)
    return folder
