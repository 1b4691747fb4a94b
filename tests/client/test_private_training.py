"""`local` on the device: one row for each record, no record sees another, all noise is the mechanism's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.references.gaussian import exact_norm_at_most
from torch import nn

from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.private_training import (
    PrivateTrainer,
    per_record_gradients,
    require_one_row_each,
    require_per_record,
)
from stillroom_client.records import MAXIMUM_RECORDS, RECORDS_PER_QUERY, mine_records
from stillroom_client.training import LocalWork, Record, Trainer, query_vectors, record_losses
from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import PrivacyError, ProtocolError
from stillroom_shared.local_mechanism import Local
from stillroom_shared.lowrank import set_adapter
from stillroom_shared.mechanism import RESOLUTION
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import Release

# Of the lowest layer, whose inputs are frozen embeddings; the trainer silences it for itself.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

TEMPERATURE = 0.1
TEXTS = [
    "open the zip file", "list the members", "sort a list of words", "a tapir eats leaves", "read the index",
    "an array", "search the index", "write the file",
]  # fmt: skip
OPENED = [("what eats leaves", "p3"), ("how do i sort", "p2"), ("zip", "p0"), ("list members of the tar file", "p1")]


@pytest.fixture
def trainer(tiny_release: Release) -> PrivateTrainer:
    torch.set_num_threads(1)
    return PrivateTrainer(tiny_release.folder, tiny_release.adapter_spec)


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Device:
    device = Device.create(tmp_path / "home", tiny_release, link=True)
    device.add(Passage(f"p{number}", "own", text) for number, text in enumerate(TEXTS))
    return device


def local(size: int, **changes: float) -> Local:
    fields: dict[str, float] = {
        "clip_norm": 0.05, "noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 2, "records": 16, "dimension": size,
    }  # fmt: skip
    return Local(**(fields | changes))  # type: ignore[arg-type]


def random_records(count: int, seed: int, candidates: int = 5) -> list[Record]:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, candidates, 32))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    lengths = generator.integers(3, 12, size=count)
    tokens = [tuple(int(t) for t in generator.integers(5, 60, size=n)) for n in lengths]
    return [Record(own, rows.astype(np.float16)) for own, rows in zip(tokens, vectors, strict=True)]


def clear(trainer: PrivateTrainer) -> None:
    for parameter in trainer.parameters.values():
        parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]


def gradients_in_one_pass(trainer: PrivateTrainer, adapter: Adapter, records: list[Record]) -> NDArray[np.float32]:
    set_adapter(trainer._wrapped, adapter)
    clear(trainer)
    trainer.backward(records, TEMPERATURE)
    require_one_row_each(trainer.parameters, len(records))
    found = per_record_gradients(trainer.parameters)
    clear(trainer)
    return found


def bounded_sum(
    trainer: PrivateTrainer, adapter: Adapter, records: list[Record], mechanism: Local
) -> NDArray[np.int64]:
    """What a step noises, when every coin falls on its record."""
    total = np.zeros(mechanism.dimension, np.int64)
    for gradient in trainer.gradients(adapter, records, TEMPERATURE):
        total += mechanism.bound(gradient)
    return total


def test_each_gradient_is_that_of_its_record_alone(trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
    """Our sampler for `B` in Opacus against plain autograd, one record at a time, without any hook."""
    records = random_records(6, 1)
    together = gradients_in_one_pass(trainer, tiny_adapter, records)
    alone = [gradients_in_one_pass(trainer, tiny_adapter, [record])[0] for record in records]
    plain = trainer.tower._module  # the tower under the hooks
    trainer.tower.disable_hooks()
    longest = np.linalg.norm(together, axis=1).max()
    for row, single, record in zip(together, alone, records, strict=True):
        loss = record_losses(query_vectors(plain, [record.tokens]), [record], TEMPERATURE).sum()
        parts = torch.autograd.grad(loss, list(trainer.parameters.values()))
        own = torch.cat([part.flatten() for part in parts]).numpy()
        assert np.linalg.norm(single - own) < 1e-6 * np.linalg.norm(own)
        assert np.linalg.norm(row - own) < 1e-5 * longest  # padding and other rows cost some bits
        assert np.linalg.norm(own) > 1e-2, "gradients this small would be equal by accident"
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_without_clipping_and_noise_it_is_plain_training(
    trainer: PrivateTrainer, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """Another loss, a lost record, a wrong sign, order or denominator would still be private, and learn nothing."""
    records, spec = random_records(5, 2), tiny_adapter.spec
    mechanism = local(
        spec.size, clip_norm=50.0, noise_multiplier=1e-9, sampling_rate=1.0, steps=2, records=len(records)
    )
    found = trainer.update(
        tiny_adapter, records, mechanism, learning_rate=0.5, temperature=TEMPERATURE, randomness=Randomness(seed="a")
    )
    work = LocalWork(steps=2, learning_rate=0.5, temperature=TEMPERATURE)
    expected = Trainer(tiny_release.folder, spec).update(tiny_adapter, records, work)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert np.abs(expected).max() > 1e-2


class TestNeighbouringRecords:
    """Records of a device with and without one of them."""

    def test_a_sum_moves_by_the_bounded_gradient_of_the_record_and_by_no_bit_more(
        self, trainer: PrivateTrainer, tiny_adapter: Adapter
    ) -> None:
        """Rows of one pass touch each other's last bits: several grid steps for every other record."""
        records, mechanism = random_records(7, 3), local(tiny_adapter.spec.size)
        total = bounded_sum(trainer, tiny_adapter, records, mechanism)
        moved = []
        for absent in range(len(records)):
            others = [record for i, record in enumerate(records) if i != absent]
            difference = total - bounded_sum(trainer, tiny_adapter, others, mechanism)
            own = bounded_sum(trainer, tiny_adapter, [records[absent]], mechanism)
            np.testing.assert_array_equal(difference, own)
            assert exact_norm_at_most(difference, mechanism.sensitivity)
            moved.append(float(np.linalg.norm(difference.astype(np.float64))))
        assert max(moved) > 0.999 * mechanism.sensitivity, "no gradient was clipped: any clip norm would pass"

    def test_a_loss_that_couples_records_is_caught(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """In-batch negatives give one row for each record, so that only neighbouring data shows them."""
        records = random_records(5, 4)
        set_adapter(trainer._wrapped, tiny_adapter)

        def gradients(own: list[Record], *, coupled: bool) -> NDArray[np.float32]:
            clear(trainer)
            if coupled:
                vectors = query_vectors(trainer.tower, [record.tokens for record in own])
                relevant = torch.from_numpy(np.stack([record.candidates[0] for record in own])).float()
                scores = vectors @ relevant.T / TEMPERATURE  # each record's negatives are the others' passages
                nn.functional.cross_entropy(scores, torch.arange(len(own)), reduction="sum").backward()  # type: ignore[no-untyped-call]
            else:
                trainer.backward(own, TEMPERATURE)
            require_one_row_each(trainer.parameters, len(own))  # the run-time check sees nothing wrong
            return per_record_gradients(trainer.parameters)

        def others_moved(*, coupled: bool) -> float:
            every, fewer = gradients(records, coupled=coupled), gradients(records[:-1], coupled=coupled)
            return float(np.abs(every[:-1] - fewer).max())

        assert others_moved(coupled=False) < 1e-6
        assert others_moved(coupled=True) > 1e-3

    def test_a_record_that_is_not_finite_contributes_zero_and_spoils_no_other(
        self, trainer: PrivateTrainer, tiny_adapter: Adapter
    ) -> None:
        """NaN in a sum is seen by everybody, and by nobody when it is dropped with the batch."""
        records, mechanism = random_records(3, 5), local(tiny_adapter.spec.size)
        broken = Record(records[1].tokens, np.full_like(records[1].candidates, np.nan))
        found = bounded_sum(trainer, tiny_adapter, [records[0], broken, records[2]], mechanism)
        expected = bounded_sum(trainer, tiny_adapter, [records[0], records[2]], mechanism)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        "broken",
        [
            pytest.param(Record((5, 10**6), random_records(1, 14)[0].candidates), id="before the first layer"),
            pytest.param(Record((5, 6), np.ones((5, 40), np.float16)), id="after the last layer"),
        ],
    )
    def test_a_record_on_which_the_tower_fails_contributes_zero_and_withdraws_no_other(
        self, trainer: PrivateTrainer, tiny_adapter: Adapter, broken: Record
    ) -> None:
        """A device that gives up because of one query differs from its neighbour by all of its queries."""
        records, mechanism = random_records(3, 15), local(tiny_adapter.spec.size)
        found = bounded_sum(trainer, tiny_adapter, [records[0], broken, *records[1:]], mechanism)
        np.testing.assert_array_equal(found, bounded_sum(trainer, tiny_adapter, records, mechanism))

    def test_with_the_same_coins_and_noise_a_release_differs_by_the_record_alone(
        self, trainer: PrivateTrainer, tiny_adapter: Adapter
    ) -> None:
        """Noise, coins or denominator that follow from the records would show between neighbours."""
        records, mechanism = random_records(3, 6), local(tiny_adapter.spec.size, sampling_rate=1.0, steps=1)

        def update(own: list[Record]) -> NDArray[np.float32]:
            return trainer.update(
                tiny_adapter,
                own,
                mechanism,
                learning_rate=1.0,
                temperature=TEMPERATURE,
                randomness=Randomness(seed="n"),
            )

        own = bounded_sum(trainer, tiny_adapter, records[2:], mechanism) * (0.05 / RESOLUTION / 16)
        np.testing.assert_allclose(update(records[:2]) - update(records), own, atol=1e-6)
        assert np.abs(own).max() > 1e-4

    def test_at_most_the_public_number_of_records_enters(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """The denominator is made for so many; the latest count."""
        records, mechanism = random_records(5, 7), local(tiny_adapter.spec.size, records=2)

        def update(own: list[Record]) -> NDArray[np.float32]:
            return trainer.update(
                tiny_adapter,
                own,
                mechanism,
                learning_rate=1.0,
                temperature=TEMPERATURE,
                randomness=Randomness(seed="c"),
            )

        np.testing.assert_array_equal(update(records), update(records[3:]))
        assert np.abs(update(records[3:]) - update(records[:2])).max() > 1e-4


class TestNoise:
    """What leaves a device that holds nothing is the noise alone."""

    def update(self, trainer: PrivateTrainer, adapter: Adapter, mechanism: Local, seed: str) -> NDArray[np.float32]:
        return trainer.update(
            adapter, [], mechanism, learning_rate=1.0, temperature=TEMPERATURE, randomness=Randomness(seed=seed)
        )

    def test_every_step_of_an_empty_device_releases_noise_of_the_accounted_scale(self, trainer: PrivateTrainer) -> None:
        """A step that is skipped when no coin falls tells that none fell, and all that was accounted for is the noise."""
        zero = Adapter.zero(trainer.spec)
        for steps in (1, 3):
            mechanism = local(trainer.spec.size, steps=steps)
            values = np.concatenate([self.update(trainer, zero, mechanism, f"{steps} {n}") for n in range(40 // steps)])
            step = mechanism.event().noise_multiplier * 0.05 / (0.5 * 16)
            expected = step * np.sqrt(mechanism.event().releases)
            error = 4 * expected / np.sqrt(2 * len(values))
            assert abs(values.std() - expected) < error
            assert abs(values.std() - 0.9 * expected) > error
            assert abs(values.std() - 1.1 * expected) > error

    def test_noise_is_never_used_twice(self, trainer: PrivateTrainer) -> None:
        """The same noise on two releases is subtracted."""
        mechanism, zero = local(trainer.spec.size, steps=1), Adapter.zero(trainer.spec)
        randomness = Randomness(seed="stream")
        first, second = (
            trainer.update(zero, [], mechanism, learning_rate=1.0, temperature=1.0, randomness=randomness) for _ in "ab"
        )
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.3
        assert np.abs(first - second).min() > 0

    def test_a_sum_is_noised_once(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """A sum that stays after its step is released again by the next one, which is charged for one batch only."""
        records, once = random_records(1, 8), 0.05 / 16
        moved = []
        for steps in (1, 2):
            mechanism = local(trainer.spec.size, sampling_rate=1.0, steps=steps, noise_multiplier=1e-9, clip_norm=0.05)
            change = trainer.update(
                tiny_adapter, records, mechanism, learning_rate=1.0, temperature=TEMPERATURE, randomness=Randomness()
            )
            moved.append(float(np.linalg.norm(change)))
        assert moved[0] == pytest.approx(once, rel=1e-3), "the gradient is longer than the clip norm"
        assert moved[1] <= 2 * once * 1.001


class TestRefusals:
    """One row for each record, checked at run time; the culprit is named."""

    def test_candidates_as_rows(self, trainer: PrivateTrainer) -> None:
        """A query packed with its K passages is clipped as K + 1 records: K + 1 times the sensitivity."""
        packed = [tokens for record in random_records(2, 9) for tokens in (record.tokens, (5, 6), (7, 8))]
        query_vectors(trainer.tower, packed).sum().backward()  # type: ignore[no-untyped-call]
        with pytest.raises(PrivacyError, match=r"layer\.0\.query\.B: Opacus saw 6 rows for 2 records"):
            trainer.take(2)

    def test_one_row_for_several_records(self, trainer: PrivateTrainer) -> None:
        """Fewer rows than records is the same fault in the other direction: one clip for all of them."""
        trainer.backward(random_records(1, 10), TEMPERATURE)
        with pytest.raises(PrivacyError, match="1 rows for 3 records"):
            trainer.take(3)

    def test_passes_that_pile_up(self, trainer: PrivateTrainer) -> None:
        """Opacus keeps a list then, whose rows no longer match the records of a pass."""
        for record in random_records(2, 11):
            trainer.backward([record], TEMPERATURE)
        with pytest.raises(PrivacyError, match=r"layer\.0\.query\.B holds the gradients of 2 passes"):
            trainer.take(2)

    def test_a_pass_that_nobody_took_over(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """A gradient that is left behind would enter the sum with the next record, as one of twice the length."""
        trainer.backward(random_records(1, 12), TEMPERATURE)
        with pytest.raises(PrivacyError, match="gradients of 2 passes"):
            self.update(trainer, tiny_adapter)

    def test_no_pass_at_all(self, trainer: PrivateTrainer) -> None:
        """A parameter that Opacus did not see has a gradient that nobody clipped."""
        with pytest.raises(PrivacyError, match=r"layer\.0\.query\.B has no gradient for each record.*1 were expected"):
            trainer.take(1)

    def test_evaluation_mode(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """Opacus catches no activations then."""
        trainer.tower.train(False)
        with pytest.raises(PrivacyError, match=r"layer\.0\.attention\.self\.query is in evaluation mode"):
            self.update(trainer, tiny_adapter)

    def test_dropout(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """A mask from a global generator is shared by neighbours or not, as it happens."""
        dropout = next(m for m in trainer.tower.modules() if isinstance(m, nn.Dropout))
        assert dropout.p == 0.0
        dropout.p = 0.1
        with pytest.raises(PrivacyError, match=r"embeddings\.dropout drops out with probability 0\.1"):
            self.update(trainer, tiny_adapter)

    def test_a_trainable_parameter_outside_of_the_adapter(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """Its gradient would be neither clipped nor noised, and its change no part of the update."""
        name, parameter = next((n, p) for n, p in trainer.tower.named_parameters() if n.endswith("LayerNorm.weight"))
        parameter.requires_grad_(True)
        with pytest.raises(PrivacyError, match=f"{name} is trainable"):
            self.update(trainer, tiny_adapter)
        with pytest.raises(PrivacyError, match=name):
            require_per_record(trainer.tower, trainer.parameters)

    def test_an_adapter_of_another_size(self, trainer: PrivateTrainer, tiny_adapter: Adapter) -> None:
        """Noise of another dimension is noise of another mechanism."""
        with pytest.raises(ProtocolError, match=f"for 7 values, the adapter has {trainer.spec.size}"):
            self.update(trainer, tiny_adapter, dimension=7)

    def update(self, trainer: PrivateTrainer, adapter: Adapter, **changes: float) -> None:
        mechanism = local(trainer.spec.size, **({"sampling_rate": 1.0} | changes))
        trainer.update(
            adapter,
            random_records(1, 13),
            mechanism,
            learning_rate=1.0,
            temperature=TEMPERATURE,
            randomness=Randomness(),
        )


class TestMining:
    """Which records a query enters: neighbouring feedback."""

    def same(self, first: list[Record], second: list[Record]) -> None:
        assert [record.tokens for record in first] == [record.tokens for record in second]
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.candidates, other.candidates)

    def test_removing_a_query_changes_no_bit_of_any_other_record(self, device: Device, tiny_release: Release) -> None:
        """Queries that are encoded or searched in one batch share its shape, and int8 shares its scale."""
        encoder = Encoder(tiny_release)
        device.record(OPENED)
        every = mine_records(device, encoder, candidates=4, one_per_query=True)
        assert len(every) == len(OPENED)
        for absent in range(len(OPENED)):
            device.erase_feedback()
            device.record(pair for i, pair in enumerate(OPENED) if i != absent)
            without = mine_records(device, encoder, candidates=4, one_per_query=True)
            self.same(without, [record for i, record in enumerate(every) if i != absent])

    def test_a_query_enters_one_record_however_often_it_was_opened(self, device: Device, tiny_release: Release) -> None:
        """Two records of one text add up to twice the clip norm under the noise for one."""
        encoder = Encoder(tiny_release)
        device.record([("zip", "p0"), ("sort", "p2"), ("zip", "p1"), ("ZIP", "p4"), ("sort", "p5")])
        assert len(mine_records(device, encoder, candidates=4)) == 5
        zipped, ordered = mine_records(device, encoder, candidates=4, one_per_query=True)
        assert (zipped.tokens, ordered.tokens) == tuple(encoder.tokenize_queries(["zip", "sort"]))
        np.testing.assert_allclose(zipped.candidates[0], device.vectors_of(["p4"])[0], atol=1e-3)
        np.testing.assert_allclose(ordered.candidates[0], device.vectors_of(["p5"])[0], atol=1e-3)
        device.erase_feedback()
        device.record([("sort", "p2"), ("sort", "p5")])  # a device that never asked for "zip"
        self.same([ordered], mine_records(device, encoder, candidates=4, one_per_query=True))
        assert RECORDS_PER_QUERY == 1

    def test_beyond_the_cap_one_query_leaves_and_one_older_may_enter(
        self, device: Device, tiny_release: Release
    ) -> None:
        """Zero-out leaves the place empty; the distance to never having asked must not be more than that."""
        encoder = Encoder(tiny_release)
        letters = "abcdefghijklmnopqrstuvwxyz"
        history = [(f"{first} {second}", "p0") for first in letters[:3] for second in letters][: MAXIMUM_RECORDS + 2]
        assert len(history) > MAXIMUM_RECORDS
        device.record(history)
        before = mine_records(device, encoder, candidates=2, one_per_query=True)
        device.erase_feedback()
        device.record(pair for i, pair in enumerate(history) if i != 40)
        after = mine_records(device, encoder, candidates=2, one_per_query=True)
        assert len(before) == len(after) == MAXIMUM_RECORDS
        gone = 40 - (len(history) - MAXIMUM_RECORDS)
        self.same(after[1:], before[:gone] + before[gone + 1 :])

    @pytest.mark.parametrize("fault", ["not finite", "not encoded", "not read"])
    def test_a_query_that_cannot_be_mined_is_no_record_and_changes_no_other(
        self, device: Device, tiny_release: Release, fault: str
    ) -> None:
        """A device that fails as a whole withdraws all its records because of one, more than one query's worth."""

        class Failing(Encoder):
            def encode_queries(self, texts: Iterable[str]) -> NDArray[np.float32]:
                vectors = super().encode_queries(texts := list(texts))
                if "zip" in texts and fault == "not encoded":
                    raise RuntimeError("the session failed")
                return np.where([[text == "zip"] for text in texts], np.nan, vectors).astype(np.float32)

            def tokenize_queries(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
                if "zip" in (texts := list(texts)) and fault == "not read":
                    raise RuntimeError("the tokenizer failed")
                return super().tokenize_queries(texts)

        device.record(OPENED)
        sound, failing = Encoder(tiny_release), Failing(tiny_release)
        place = [query for query, _ in OPENED].index("zip")
        assert place < len(OPENED) - 1, "nothing would come after it"
        every = mine_records(device, sound, candidates=4, one_per_query=True)
        others = [record for i, record in enumerate(every) if i != place]
        self.same(mine_records(device, failing, candidates=4, one_per_query=True), others)
        # It keeps its place: among the latest few, no older query enters for it.
        few = len(OPENED) - place
        self.same(mine_records(device, failing, candidates=4, one_per_query=True, most=few), others[place:])
        device.erase_feedback()
        device.record(pair for i, pair in enumerate(OPENED) if i != place)
        self.same(mine_records(device, failing, candidates=4, one_per_query=True), others)

    def test_only_what_was_opened_becomes_a_record_and_a_search_changes_none(
        self, device: Device, tiny_release: Release, tmp_path: Path
    ) -> None:
        """What a search keeps to answer faster depends on earlier queries; a record must not."""
        encoder = Encoder(tiny_release)
        device.record(OPENED)
        fresh = mine_records(device, encoder, candidates=4, one_per_query=True)
        for query in ("what eats leaves", "something else", "zip"):
            device.search(query)
        self.same(fresh, mine_records(device, encoder, candidates=4, one_per_query=True))
        ids, near = device.candidates(encoder.encode_queries([OPENED[0][0]]), 4)
        expected = [near[0][i] for i, name in enumerate(ids[0]) if name != "p3"]
        mined = fresh[0].candidates[1:].astype(np.float32)
        np.testing.assert_allclose(mined, expected[:3], atol=1e-3)
