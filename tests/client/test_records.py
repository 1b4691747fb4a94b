"""Mining: each record from its own query alone, the opened passage first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.records import mine_records
from stillroom_shared.corpus import Passage
from stillroom_shared.release import Release

TEXTS = [
    "open the zip file",
    "list the members",
    "sort a list of words",
    "a tapir eats leaves",
    "read the index",
    "an array",
]


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Device:
    device = Device.create(tmp_path / "home", tiny_release, link=True)
    device.add(Passage(f"p{number}", "own", text) for number, text in enumerate(TEXTS))
    device.record([("what eats leaves", "p3"), ("how do i sort", "p2")])
    return device


def test_the_opened_passage_comes_first_and_once(device: Device, tiny_release: Release) -> None:
    """A relevant passage that also stands among the negatives teaches the opposite."""
    records = mine_records(device, Encoder(tiny_release), candidates=4)
    opened = device.vectors_of(["p3", "p2"])
    for record, vector in zip(records, opened, strict=True):
        assert record.candidates.shape == (4, 32)
        np.testing.assert_allclose(record.candidates[0], vector, atol=1e-3)
        assert np.abs(record.candidates[1:].astype(np.float32) - vector).max(axis=1).min() > 1e-3


def test_removing_a_query_changes_no_other_record(device: Device, tiny_release: Release) -> None:
    """With the query as the unit, a record that depends on another query breaks the sensitivity."""
    encoder = Encoder(tiny_release)
    both = mine_records(device, encoder, candidates=4)
    device.erase_feedback()
    device.record([("how do i sort", "p2")])
    (alone,) = mine_records(device, encoder, candidates=4)
    assert alone.tokens == both[1].tokens
    np.testing.assert_array_equal(alone.candidates, both[1].candidates)


def test_a_small_index_gives_fewer_candidates_and_no_feedback_no_records(device: Device, tiny_release: Release) -> None:
    """Padding with zeros would add candidates that no passage has."""
    assert {len(r.candidates) for r in mine_records(device, Encoder(tiny_release), candidates=50)} == {len(TEXTS)}
    device.erase_feedback()
    assert mine_records(device, Encoder(tiny_release), candidates=4) == []
