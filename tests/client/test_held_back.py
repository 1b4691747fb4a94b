"""Held-back queries: never trained on, always the same ones, and what they say about two adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from tests.references import ndcg as reference

from stillroom_client.app import HOME_KEY, client_app
from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.held_back import HeldBack, held_back, set_held_back_key
from stillroom_client.participation import LEDGER_FILE, Consent, device_receipt, take_part
from stillroom_client.records import mine_records
from stillroom_client.scoring import held_back_difference, held_back_queries, ndcg
from stillroom_shared.adapter import Adapter
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import BudgetError, ProtocolError
from stillroom_shared.events import SampledGaussian
from stillroom_shared.ledger import Ledger
from stillroom_shared.protocol import EvaluationOrder, RoundOrder, evaluation_message, read_evaluation, read_update
from stillroom_shared.receipts import Attempt
from stillroom_shared.release import Release
from stillroom_simulations.engine import InProcessGrid

WORDS = ("open", "close", "read", "write", "zip", "tar", "files", "list", "sort", "search", "index", "tapir")
KEY = bytes(range(32))


def evaluation(**changes: object) -> EvaluationOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": 3, "attempt": 2, "evaluation": 1, "noise_multiplier": 2.0,
        "sampling_rate": 1.0, "devices": 50, "bound": 0.2, "held_back": 0.5,
    }  # fmt: skip
    return EvaluationOrder.model_validate(fields | changes)


def training(**changes: object) -> RoundOrder:
    fields: dict[str, object] = {
        "federation": "f", "release": "r", "round": 1, "attempt": 1, "mechanism": "central", "clip_norm": 1.0,
        "noise_multiplier": 2.0, "sampling_rate": 0.1, "devices": 50, "dimension": 256, "steps": 1, "learning_rate": 1.0,
        "temperature": 0.05, "candidates": 4,
    }  # fmt: skip
    return RoundOrder.model_validate(fields | changes)


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release, tiny_adapter: Adapter) -> Device:
    """Passages stand where the query tower puts their query under `tiny_adapter`: it finds all, another finds few."""
    device = Device.create(tmp_path / "home", tiny_release, link=True)
    vectors = Encoder(tiny_release, adapter=tiny_adapter).encode_queries(f"how do i {word}" for word in WORDS)
    device.add([Passage(word, "own", f"about {word}") for word in WORDS], vectors)
    device.record((f"how do i {word}", word) for word in WORDS)
    set_held_back_key(device, KEY)
    return device


def test_the_share_is_kept_and_devices_differ() -> None:
    """Without a key, a question that everybody asks is kept from training everywhere."""
    texts = [f"query number {number}" for number in range(4_000)]
    one, other = HeldBack(KEY, 0.25), HeldBack(bytes(32), 0.25)
    held = {text for text in texts if one.holds(text)}
    assert abs(len(held) - 1_000) < 4 * np.sqrt(4_000 * 0.25 * 0.75)
    both = sum(other.holds(text) for text in held)
    assert abs(both - 250) < 5 * np.sqrt(1_000 * 0.25 * 0.75), "splits of two devices are independent"
    assert not any(HeldBack(KEY, 0.0).holds(text) for text in texts)
    assert held <= {text for text in texts if HeldBack(KEY, 0.3).holds(text)}


def test_what_is_held_back_is_never_trained_on_and_the_rest_always_is(device: Device, tiny_release: Release) -> None:
    """A query that is trained on and scored makes every candidate look better than it is."""
    encoder = Encoder(tiny_release)
    device.record([("How do I OPEN?", "close"), ("how do  i zip", "tar")])
    held = held_back_queries(device, 0.5)
    trained = mine_records(device, encoder, candidates=3, held_back_share=0.5)
    tokens = set(encoder.tokenize_queries(held))
    assert tokens and trained
    assert not tokens & {record.tokens for record in trained}
    assert len(trained) + sum(map(len, held.values())) == len(device.feedback()) == 14
    assert len(mine_records(device, encoder, candidates=3)) == 14, "without a share nothing changes"


def test_the_split_outlives_restarts_and_what_comes_later(
    device: Device, tmp_path: Path, tiny_release: Release
) -> None:
    """A split that is drawn anew scores what was trained on yesterday."""
    before = set(held_back_queries(device, 0.5))
    device.record([("what is an array", "list")])
    device.remove(["tapir"])
    device.close()
    with Device.open(tmp_path / "home") as again:
        set_held_back_key(again, bytes(32))  # too late: it has one
        assert held_back(again, 0.5).key == KEY
        assert set(held_back_queries(again, 0.5)) - {"what is an array"} == before - {"how do i tapir"}
    with Device.create(tmp_path / "other", tiny_release, link=True) as other:
        assert held_back(other, 0.5).key == held_back(other, 0.5).key != KEY


def test_ndcg_is_that_of_the_reference() -> None:
    """A discount that starts one rank late rewards nothing at the top."""
    generator = np.random.default_rng(0)
    names = [f"p{number}" for number in range(15)]
    for _ in range(50):
        found = list(generator.permutation(names))
        relevant = {str(name) for name in generator.choice(names, size=generator.integers(1, 13), replace=False)}
        expected = reference.ndcg(found, dict.fromkeys(relevant, 1))
        assert ndcg(found, relevant, 10) == pytest.approx(expected, abs=1e-12)


def test_the_device_prefers_the_adapter_that_finds_what_was_opened(
    device: Device, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """A sign that is turned round publishes what is worse; scores of the training queries say nothing about either."""
    encoder, zero = Encoder(tiny_release), Adapter.zero(tiny_adapter.spec)
    better = held_back_difference(device, encoder, zero, tiny_adapter, share=0.5, cutoff=10)
    worse = held_back_difference(device, encoder, tiny_adapter, zero, share=0.5, cutoff=10)
    assert better is not None and worse is not None
    assert better > 0.1
    assert better == pytest.approx(-worse)
    assert held_back_difference(device, encoder, zero, zero, share=0.5, cutoff=10) == 0.0
    trained = [word for word in WORDS if f"how do i {word}" not in held_back_queries(device, 0.5)]
    device.remove(trained)  # fewer passages compete, and what was opened of them is gone; held-back queries stay
    assert held_back_queries(device, 0.5).keys() == {f"how do i {w}" for w in WORDS if w not in trained}
    device.erase_feedback()
    assert held_back_difference(device, encoder, zero, tiny_adapter, share=0.5, cutoff=10) is None


def test_an_evaluation_is_recorded_like_a_round_and_never_answered_twice(tmp_path: Path, device: Device) -> None:
    """Attempts that are numbered apart would let one hide behind the other, and receipts could not name them."""
    home = tmp_path / "home"
    Consent(federation="f", participations=3).save(home)
    take_part(home, training(round=3))
    take_part(home, evaluation())
    with pytest.raises(BudgetError, match="answered already"):
        take_part(home, evaluation())
    with pytest.raises((BudgetError, ProtocolError)):
        take_part(home, training(round=3, attempt=2))
    take_part(home, training(round=4))
    with pytest.raises(BudgetError, match="over the cap of 3"):
        take_part(home, evaluation(round=4, evaluation=2))
    with Ledger.open(home / LEDGER_FILE) as ledger:
        events = ledger.events()
    assert isinstance(events[1], SampledGaussian)
    assert (events[1].sampling_rate, events[1].dimension) == (1.0, 3)
    assert {Attempt(3, 1), Attempt(3, 2), Attempt(4, 1)} <= set(device_receipt(home, "f").charges)


def test_too_little_noise_or_another_federation_is_declined_before_anything_is_spent(
    tmp_path: Path, device: Device
) -> None:
    """An evaluation is a release like any other: consent is asked for it too."""
    home = tmp_path / "home"
    Consent(federation="g", minimum_noise_multiplier=1.0).save(home)
    with pytest.raises(ProtocolError, match="joined 'g'"):
        take_part(home, evaluation())
    with pytest.raises(BudgetError, match=r"noise multiplier 0\.6 is below"):
        take_part(home, evaluation(federation="g", noise_multiplier=0.6))
    assert not (home / LEDGER_FILE).exists()
    Consent(mechanisms=("correlated",)).save(home)
    with pytest.raises(BudgetError, match="'central' is not among"):
        take_part(home, evaluation())


def answers(home: Path, order: EvaluationOrder, baseline: Adapter, candidate: Adapter) -> list[int]:
    grid = InProcessGrid(client_app=client_app(), nodes={2: {HOME_KEY: str(home)}})
    message = grid.create_message(evaluation_message(order, baseline, candidate), "evaluate", 2, "3")
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    assert set(reply.content) - {"receipt"} == {"update"}
    return list(read_update(reply.content, 3).tolist())


def test_a_device_that_declines_or_has_nothing_to_say_sends_the_same_zeros(
    tmp_path: Path, device: Device, tiny_release: Release, tiny_adapter: Adapter
) -> None:
    """An error, or an answer of another shape, tells the coordinator who holds back what."""
    home, zero = tmp_path / "home", Adapter.zero(tiny_adapter.spec)
    real = evaluation(release=tiny_release.id)
    bounded = answers(home, real, zero, tiny_adapter)
    assert bounded == real.comparison.answer(1.0).tolist(), "a whole difference is clipped to the bound"
    assert answers(home, real, zero, tiny_adapter) == [0, 0, 0], "the same attempt again"
    other = evaluation(release="another", attempt=3)
    assert answers(home, other, zero, tiny_adapter) == [0, 0, 0]
    Consent(mechanisms=()).save(home)
    assert answers(home, evaluation(release=tiny_release.id, attempt=4), zero, tiny_adapter) == [0, 0, 0]
    Consent().save(home)
    device.erase_feedback()
    assert answers(home, evaluation(release=tiny_release.id, attempt=5), zero, tiny_adapter) == [0, 0, 0]
    with Ledger.open(home / LEDGER_FILE) as ledger:
        assert len(ledger.events()) == 2, "having nothing to say costs the same as saying something"


def test_an_order_of_an_evaluation_is_read_strictly(tiny_adapter: Adapter) -> None:
    """A field that only one version knows would change what both sides believe is bounded."""
    zero = Adapter.zero(tiny_adapter.spec)
    order, baseline, candidate = read_evaluation(evaluation_message(evaluation(), zero, tiny_adapter))
    assert order == evaluation()
    assert not baseline.values.any()
    np.testing.assert_array_equal(candidate.values, tiny_adapter.values)
    with pytest.raises(ProtocolError, match="allows exactly"):
        read_evaluation(RecordDict())
    content = evaluation_message(evaluation(), zero, tiny_adapter)
    content["more"] = content["baseline"]
    with pytest.raises(ProtocolError, match="allows exactly"):
        read_evaluation(content)
    for changes in ({"cutoff": 20}, {"held_back": 0.0}, {"mechanism": "none"}, {"noise_multiplier": 0.0}):
        text = evaluation().model_copy(update=changes)
        with pytest.raises(ProtocolError, match="cannot be read"):
            read_evaluation(evaluation_message(text, zero, tiny_adapter))


def test_an_evaluation_that_cannot_be_read_says_nothing_of_the_device(tmp_path: Path) -> None:
    """Flower sends the text of an exception to the coordinator; a home path is private."""
    grid = InProcessGrid(client_app=client_app(), nodes={2: {HOME_KEY: str(tmp_path / "secret")}})
    message: Message = grid.create_message(RecordDict(), "evaluate", 2, "1")
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert "secret" not in str(reply.error.reason)
