"""Indexes of fewer dimensions: both sides cut alike, fewer bytes, and training on what the device ranks."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.devices import ANIMALS, passages, units
from torch.nn import functional
from transformers import BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.doctor import examine
from stillroom_client.encoder import Encoder
from stillroom_client.matryoshka import prefix
from stillroom_client.private_training import PrivateTrainer
from stillroom_client.records import mine_records
from stillroom_client.scoring import held_back_difference
from stillroom_client.search import Device
from stillroom_client.training import LocalWork, Record, Trainer, record_losses
from stillroom_server.publish import publish_release
from stillroom_shared.adapter import Adapter
from stillroom_shared.cli import build_app
from stillroom_shared.errors import DataError, ReleaseError, SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey


def short(home: Path, release: Release, dimension: int = 16) -> Device:
    device = Device.create(home, release, link=True, dimension=dimension)
    device.add(passages(ANIMALS))
    return device


def cut(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float64]:
    """The slow twin of `prefix`."""
    return np.array([row[:dimension] / np.sqrt(sum(float(x) ** 2 for x in row[:dimension])) for row in vectors])


@given(st.integers(1, 20), st.integers(2, 64), st.data())
@settings(deadline=None)
def test_a_prefix_is_a_unit_vector_of_the_first_components(count: int, full: int, data: st.DataObject) -> None:
    """Guards against vectors that are cut and not renormalised: their inner products are no cosines."""
    dimension = data.draw(st.integers(1, full))
    vectors = units(count, full)
    found = prefix(vectors, dimension, full=full)
    np.testing.assert_allclose(found, cut(vectors, dimension), atol=1e-6)
    assert prefix(found, dimension, full=full) is found or dimension == full
    with pytest.raises(DataError, match="vector 0 has norm 0"):
        prefix(np.eye(3, dtype=np.float32)[2:], 2, full=3)


def test_a_short_index_ranks_by_prefixes_on_both_sides(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a cut on one side only, and a dimension that is forgotten at the next start."""
    short(tmp_path / "home", tiny_release).close()
    with Device.open(tmp_path / "home") as device:
        encoder = Encoder(tiny_release)
        stored = device.vectors_of(ANIMALS)
        texts = [passage.full_text for passage in passages(ANIMALS)]
        assert stored.shape == (10, 16) and np.abs(stored - cut(encoder.encode_documents(texts), 16)).max() < 0.005
        query = cut(encoder.encode_queries(["an okapi"]), 16)
        expected = (query @ stored.T)[0]
        hits = device.search("an okapi", 10, mode="dense")
        assert [hit.passage_id for hit in hits] == [ANIMALS[n] for n in np.argsort(-expected)]
        assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=0.01)
        assert device.search("okapi")[0].passage_id == "okapi"
        assert device.search_many(encoder.encode_queries(["an okapi"]), 10) == [[hit.passage_id for hit in hits]]
        assert examine(device).measures.recall is not None and device.status().dimension == 16


def test_a_short_index_has_fewer_bytes(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a dimension that is searched, while whole vectors are stored."""
    sizes = {}
    for dimension in (16, 32):
        home = tmp_path / str(dimension)
        with Device.create(home, tiny_release, link=True, dimension=dimension) as device:
            device.add(passages([f"p{n}" for n in range(500)]), units(500, 32))
            device.refresh_index()
        db = sqlite3.connect(home / "store.sqlite3")
        assert db.execute("SELECT DISTINCT length(codes) FROM vectors").fetchall() == [(dimension,)]
        db.close()
        sizes[dimension] = (home / "index.faiss").stat().st_size
    assert sizes[32] - sizes[16] >= 500 * 16


def test_only_vectors_of_the_release_are_cut(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a store that takes the vectors of another model because they are long enough."""
    with Device.create(tmp_path / "home", tiny_release, link=True, dimension=16) as device:
        some = passages(ANIMALS[:2])
        assert device.add(some[:1], units(1, 32)).added == device.add(some[1:], units(1, 16)).added == 1
        for length in (8, 31, 48):
            with pytest.raises(DataError, match=rf"\(1, {length}\)"):
                device.add(passages(["x"]), units(1, length))
            with pytest.raises(DataError, match="cannot be searched"):
                device.candidates(units(1, length), 2)


@pytest.mark.parametrize("dimension", [0, 7, 33, -1])
def test_a_dimension_out_of_range_is_refused(tmp_path: Path, tiny_release: Release, dimension: int) -> None:
    """Guards against an index that can hold nothing; and nothing is left behind."""
    with pytest.raises(SettingsError, match=f"dimension = {dimension} is out of range: this release gives 8 to 32"):
        Device.create(tmp_path / "home", tiny_release, dimension=dimension)
    assert not (tmp_path / "home").exists()


def test_whoever_chooses_an_untrained_dimension_is_told(
    tmp_path: Path,
    tiny_release: Release,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey,
) -> None:
    """Guards against a loss that nobody mentioned, and a warning about what the release was trained for."""

    def published(name: str, lengths: tuple[int, ...]) -> Release:
        return publish_release(
            tmp_path / name, query_tower=tiny_towers[0], document_tower=tiny_release, tokenizer=tiny_tokenizer,
            spec=tiny_release.adapter_spec, adapter=None, key=signing_key, parent=None, adapter_round=0,
            privacy_statement=None, query_tokens=16, document_tokens=48, matryoshka_dimensions=lengths,
        )  # fmt: skip

    nested = published("nested", (8, 16))
    assert nested.matryoshka_dimensions == (8, 16)
    for wrong in ((16, 8), (8, 8), (32,), (0,)):
        with pytest.raises(ReleaseError, match="matryoshka_dimensions"):
            published("wrong", wrong)

    def created(name: str, release: Release, *more: str) -> str:
        arguments = ["index", "create", "--home", str(tmp_path / name), "--release", str(release.folder), *more]
        done = CliRunner().invoke(build_app(), arguments)
        assert done.exit_code == 0, done.output
        return done.stderr

    assert created("a", nested) == created("b", nested, "--dimension", "16") == created("c", tiny_release) == ""
    assert "not trained for 12 dimensions (it was for 8, 16)" in created("d", nested, "--dimension", "12")
    assert "(it states no shorter ones)" in created("e", tiny_release, "--dimension", "16")


def record(dimension: int, seed: int = 0, candidates: int = 4) -> Record:
    return Record((2, 40 + seed, 50, 3), units(candidates, dimension, seed).astype(np.float16))


def test_records_of_a_short_index_train_on_what_the_device_ranks(
    tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """Guards against full-length queries compared with short candidates, and a gradient of another loss.

    The twin computes the loss of one record at the cut and renormalised query by hand, and autograd gives its gradient; both
    trainers must agree with it, and the private one must still see one row a record.
    """
    with short(tmp_path / "home", tiny_release) as device:
        device.record([("an okapi", "tapir"), ("who swims", "dugong")])
        encoder = Encoder(tiny_release)
        mined = mine_records(device, encoder, candidates=4)
        assert [r.candidates.shape for r in mined] == [(4, 16), (4, 16)]
        np.testing.assert_allclose(mined[0].candidates[0], device.vectors_of(["tapir"])[0], atol=1e-3)
        assert held_back_difference(device, encoder, tiny_adapter, tiny_adapter, share=1.0, cutoff=10) == 0.0
    spec = tiny_release.adapter_spec
    start = Adapter(spec, np.random.default_rng(3).standard_normal(spec.size).astype(np.float32) * np.float32(0.1))
    trainer, private = Trainer(tiny_release.folder, spec), PrivateTrainer(tiny_release.folder, spec)
    whole = trainer.record_gradients(np.tile(start.values, (2, 1)), mined, 0.1)
    rows = np.stack(list(private.gradients(start, mined, 0.1)))
    for number, one in enumerate(mined):
        vector = trainer.encode(start, [one.tokens])[0]
        query = torch.tensor(vector, requires_grad=True)
        loss = record_losses(query[None], [one], 0.1)[0]
        own = query[:16] / query[:16].norm()
        scores = torch.from_numpy(one.candidates).float() @ own / 0.1
        expected = torch.logsumexp(scores, 0) - scores[0]
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        given_back = torch.autograd.grad(loss, query)[0]
        np.testing.assert_allclose(given_back, torch.autograd.grad(expected, query)[0], atol=1e-5)
        np.testing.assert_allclose(rows[number], whole[number], atol=1e-5)
        assert np.linalg.norm(rows[number]) > 1e-3
    change = trainer.update(start, mined, LocalWork(steps=1, learning_rate=0.05, temperature=0.1))
    assert change.shape == (spec.size,) and np.isfinite(change).all() and np.any(change)
    before, after = (
        record_losses(torch.from_numpy(trainer.encode(at, [r.tokens for r in mined])), mined, 0.1).sum().item()
        for at in (start, Adapter(spec, start.values + change))
    )
    assert after < before, "a step goes down the loss of the short index"


def test_devices_of_several_dimensions_train_in_one_pass(tiny_release: Release) -> None:
    """Guards against a stack of candidates of two lengths, and devices that see each other's."""
    spec = tiny_release.adapter_spec
    trainer, work = Trainer(tiny_release.folder, spec), LocalWork(steps=1, learning_rate=0.1, temperature=0.1)
    start = Adapter.zero(spec)
    devices = [[record(32, 0), record(32, 1)], [record(16, 2)], [], [record(8, 3), record(8, 4, candidates=3)]]
    together = trainer.updates(start, devices, work)
    for records, found in zip(devices, together, strict=True):
        np.testing.assert_allclose(found, trainer.update(start, records, work), atol=1e-6)
    values = np.tile(start.values, (3, 1))
    mixed = [record(32, 0), record(16, 2), record(8, 3)]
    for own, gradient in zip(mixed, trainer.record_gradients(values, mixed, 0.1), strict=True):
        np.testing.assert_allclose(gradient, trainer.record_gradients(values[:1], [own], 0.1)[0], atol=1e-5)


def test_full_length_candidates_are_trained_on_as_before() -> None:
    """Guards against a second normalization that changes the figures of record by its rounding."""
    vectors = torch.from_numpy(units(1, 32, seed=9))
    losses = record_losses(vectors, [record(32)], 0.1)
    scores = torch.einsum("rd,rcd->rc", vectors, torch.from_numpy(record(32).candidates[None]).float()) / 0.1
    assert torch.equal(losses, functional.cross_entropy(scores, torch.zeros(1, dtype=torch.int64), reduction="none"))
