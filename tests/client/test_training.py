"""Local work: batched clients are exact, records do not see each other, padding changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillroom_client.training import LocalWork, Record, Trainer
from stillroom_shared.adapter import Adapter
from stillroom_shared.release import Release

WORK = LocalWork(steps=2, learning_rate=0.5, temperature=0.1)


@pytest.fixture(scope="module")
def trainer(tiny_release: Release) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(tiny_release.folder, tiny_release.adapter_spec)


def random_records(count: int, seed: int, candidates: int = 5) -> list[Record]:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, candidates, 32))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    lengths = generator.integers(3, 12, size=count)
    tokens = [tuple(int(t) for t in generator.integers(5, 60, size=n)) for n in lengths]
    return [Record(own, rows.astype(np.float16)) for own, rows in zip(tokens, vectors, strict=True)]


def test_batched_clients_equal_one_client_at_a_time(trainer: Trainer, tiny_adapter: Adapter) -> None:
    """A row that reads another client's B, or a mean over the batch in place of the client, shows only here."""
    clients = [random_records(n, seed, candidates=c) for n, seed, c in ((4, 1, 5), (1, 2, 3), (0, 3, 5), (7, 4, 5))]
    together = trainer.updates(tiny_adapter, clients, WORK)
    alone = np.stack([trainer.update(tiny_adapter, own, WORK) for own in clients])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    assert not together[2].any(), "a client without records must send zero"
    norms = np.linalg.norm(alone[[0, 1, 3]], axis=1)
    assert norms.min() > 1e-3, "updates this small would be equal by accident"
    assert np.abs(alone[0] - alone[3]).max() > 1e-3


def test_one_step_is_the_gradient_of_the_mean_loss(trainer: Trainer, tiny_adapter: Adapter) -> None:
    """Central fine-tuning and the clip norm rely on what a step of length one means."""
    records, one = random_records(3, 5), LocalWork(steps=1, learning_rate=1.0, temperature=0.1)

    def loss(values: np.ndarray) -> float:
        vectors = trainer.encode(Adapter(trainer.spec, values.astype(np.float32)), [r.tokens for r in records])
        scores = np.einsum("rd,rcd->rc", vectors.astype(np.float64), np.stack([r.candidates for r in records])) / 0.1
        return float((np.log(np.exp(scores).sum(1)) - scores[:, 0]).mean())

    step = trainer.update(tiny_adapter, records, one)
    direction = np.random.default_rng(6).normal(size=trainer.spec.size)
    reach = 1e-2 / np.linalg.norm(direction)
    slope = (loss(tiny_adapter.values + reach * direction) - loss(tiny_adapter.values - reach * direction)) / (
        2 * reach
    )
    assert slope == pytest.approx(-float(step @ direction), rel=0.02, abs=1e-3)


def test_removing_a_record_leaves_the_others_gradients_alone(trainer: Trainer, tiny_adapter: Adapter) -> None:
    """In-batch negatives would couple records, and one query could then move every gradient."""
    records, one = random_records(4, 7), LocalWork(steps=1, learning_rate=1.0, temperature=0.1)
    every = trainer.update(tiny_adapter, records, one) * 4  # the sum over records
    without = trainer.update(tiny_adapter, records[:3], one) * 3
    own = trainer.update(tiny_adapter, records[3:], one)
    np.testing.assert_allclose(every - without, own, atol=2e-6)


def test_no_records_at_all(trainer: Trainer, tiny_adapter: Adapter) -> None:
    """A device that has opened nothing yet still answers with a vector of the right length."""
    assert not trainer.update(tiny_adapter, [], WORK).any()
    assert trainer.updates(tiny_adapter, [[], []], WORK).shape == (2, trainer.spec.size)


def test_training_changes_nothing_but_the_update(trainer: Trainer, tiny_adapter: Adapter) -> None:
    """A frozen tower that drifts, or an adapter changed in place, makes every later round wrong."""
    before = [value.detach().clone() for value in trainer.tower_parameters()]
    values = tiny_adapter.values.copy()
    first = trainer.update(tiny_adapter, random_records(3, 8), WORK)
    again = trainer.update(tiny_adapter, random_records(3, 8), WORK)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(tiny_adapter.values, values)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.tower_parameters(), strict=True))
