"""A home with something private in every place where a device keeps something, and a search for it in every byte."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from tests.client.devices import passages, units

from stillroom_client.catalog import Embedded
from stillroom_client.device import Device
from stillroom_client.documents import Document, Located, Position
from stillroom_client.encrypting import Protection
from stillroom_client.participation import Consent, refuse, take_part
from stillroom_client.quantization import quantize
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import ProtocolError
from stillroom_shared.protocol import RoundOrder
from stillroom_shared.release import Release

SECRET = Passage(
    "letter-to-ottilie", "grandmother-wilhelmine", "The zirconium brooch is buried below the quince.", "Brooch"
)
WAITING = Passage(
    "draft-of-codicil", "grandmother-wilhelmine", "The codicil names nobody of the Hohenlohe cousins.", ""
)
FILE = Path("/home/wilhelmine/testament.md")
FEDERATION = "sanatorium-davos"
QUERY = "where did mother hide the brooch"
WORDS = passages([f"p{n}" for n in range(120)], "The {0} is common and word{0} is rare.")


def order(**changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": FEDERATION, "release": "r", "round": 1, "attempt": 1, "mechanism": "central", "clip_norm": 1.0,
        "noise_multiplier": 2.0, "sampling_rate": 0.1, "devices": 50, "dimension": 256, "steps": 1, "learning_rate": 1.0,
        "temperature": 0.05, "candidates": 4,
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


def lived_in(home: Path, release: Release, protection: Protection | None = None) -> dict[str, bytes]:
    """Make a home and live in it; what must be nowhere in it in the clear, by what it is."""
    with Device.create(home, release, link=True, protection=protection) as device:
        vectors = units(len(WORDS) + 2, release.dimension, seed=7)
        device.add(WORDS, vectors[:-2])
        held_back = device.store.secret("held-back key")
        live(device, vectors[-2:])
        planted = {
            "text": SECRET.text.encode(), "owner": SECRET.owner.encode(), "id": SECRET.id.encode(),
            "path": str(FILE).encode(), "query": QUERY.encode(), "a rare word": b"zirconium",
            "its stem in the index": b"wordp17", "vector": quantize(vectors[-2:-1])[0].tobytes(),
            "staged vector": quantize(vectors[-1:])[0].tobytes(), "held-back key": held_back,
        }  # fmt: skip
    Consent(federation=FEDERATION, participations=7).save(home)
    take_part(home, order())
    refuse(home, order(attempt=2), ProtocolError("the order smells of vetiver"))
    return planted | {
        "federation": FEDERATION.encode(), "consent": b'"participations"', "refusal": b"smells of vetiver",
        "signing key": b"PRIVATE KEY", "purpose": b'"purpose"',
    }  # fmt: skip


def live(device: Device, vectors: np.ndarray) -> None:
    """A document, feedback, a vector that waits for its document, and the indexes of it all."""
    device.catalog.stage([SECRET, WAITING], Embedded(vectors, ""))
    document = Document(
        path=str(FILE), type="markdown", title="Brooch", size=1, modified_ns=1, read_ns=2, digest=b"d", reader="test"
    )
    device.catalog.put(document, [Located(SECRET, Position(place=0), {})])
    device.record([(QUERY, SECRET.id)])
    device.refresh_index()


def found_in(home: Path, planted: dict[str, bytes]) -> dict[str, list[str]]:
    """In which files below `home`, or in whose names, each of the planted things stands."""
    found: dict[str, list[str]] = {name: [] for name in planted}
    for root, folders, names in os.walk(home):
        for entry in (*folders, *names):
            content = entry.encode()
            if entry in names:
                content += b"\n" + Path(root, entry).read_bytes()
            for what, phrase in planted.items():
                if phrase in content:
                    found[what].append(str(Path(root, entry).relative_to(home)))
    return found


def anywhere(home: Path, planted: dict[str, bytes]) -> dict[str, list[str]]:
    """The same, of those that are somewhere."""
    return {what: places for what, places in found_in(home, planted).items() if places}


def structured(home: Path) -> list[str]:
    """Files of an encrypted home, large enough to tell, that can be compressed: what is encrypted cannot be."""
    suspects = []
    for path in sorted((home / "sealed").rglob("*")):
        if path.is_file() and path.name not in ("key.json", "store.sqlite3-shm"):
            content = path.read_bytes()
            if len(content) >= 1024 and len(zlib.compress(content)) < 0.97 * len(content):
                suspects.append(path.name)
    return suspects


def contents(home: Path) -> dict[Path, bytes]:
    """Every file below it."""
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
