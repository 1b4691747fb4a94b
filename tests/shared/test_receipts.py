"""Receipts: what two ledgers tell each other, and what a stranger's bytes may do."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom_shared.errors import ProtocolError
from stillroom_shared.events import Event, SampledGaussian, Unprotected
from stillroom_shared.receipts import Attempt, Receipt, Signer, issue, lost, read_receipt
from stillroom_shared.signing import SigningKey

STEP = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, sigma=2**29, dimension=10)
KEY = SigningKey.generate()
CHARGES: dict[Attempt, Event] = {Attempt(1, 1): STEP, Attempt(3, 2): STEP, Attempt(2, 1): Unprotected(dimension=10)}
ATTEMPTS = st.builds(Attempt, st.integers(1, 50), st.integers(1, 3))
HISTORIES = st.dictionaries(ATTEMPTS, st.sampled_from([STEP, Unprotected(dimension=10)]), max_size=20)


def made(charges: dict[Attempt, Event] = CHARGES, by: Signer = "coordinator", key: SigningKey = KEY) -> Receipt:
    return issue(by, charges, federation="f", device="d", key=key)


def read(content: bytes, by: Signer = "coordinator", device: str = "d", federation: str | None = "f") -> Receipt:
    return read_receipt(content, by=by, device=device, federation=federation, public_key=KEY.public)


def test_what_was_issued_is_read_back() -> None:
    """An event that comes back rounded costs something else."""
    found = read(made().model_dump_json().encode())
    assert found.charges == CHARGES
    assert list(found.charges) == sorted(CHARGES)


@settings(deadline=None, max_examples=60)
@given(HISTORIES, HISTORIES)
def test_replaying_loses_nothing_and_the_larger_spend_stays(
    own: dict[Attempt, Event], kept: dict[Attempt, Event]
) -> None:
    """Two histories that parted after a backup: the chain of neither extends the other, their union extends both."""
    missing = lost(kept, own)
    assert set(missing) == {attempt for attempt in kept if own.get(attempt) != kept[attempt]}
    replayed = own | {attempt: kept[attempt] for attempt in missing}
    assert lost(kept, replayed) == []
    assert set(replayed) == set(own) | set(kept)


def test_an_attempt_that_became_cheaper_was_lost() -> None:
    """A ledger that keeps the row and shrinks its event went back on its word, too."""
    cheaper = CHARGES | {Attempt(1, 1): SampledGaussian(noise_multiplier=9.0, sampling_rate=1.0, sigma=9, dimension=10)}
    assert lost(CHARGES, cheaper) == [Attempt(1, 1)]
    assert lost(CHARGES, CHARGES | {Attempt(9, 1): STEP}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"device": "e"}, "has device 'e'"),
        ({"federation": "g"}, "has federation 'g'"),
        ({"by": "device"}, "has by 'device'"),
        ({"public_key": SigningKey.generate().public}, "has public_key"),
        ({"public_key": "zz"}, "not an Ed25519 public key"),
        ({"signature": "00" * 64}, "signature does not hold"),
        ({"charged": []}, "signature does not hold"),
        ({"kind": "adapter"}, "kind"),
        ({"schema_version": 2}, "schema_version"),
        ({"more": 1}, "more"),
        ({"charged": [{"event": {"kind": "free"}, "attempts": [[1, 1]]}]}, "event kind 'free' is unknown"),
        ({"charged": [{"event": {"kind": "unprotected", "dimension": 1}, "attempts": [[0, 1]]}]}, "attempts"),
        ({"charged": [{"event": {"kind": "unprotected", "dimension": 1}, "attempts": [[1.5, 1]]}]}, "attempts"),
        ({"charged": [{"event": {"kind": "sampled-gaussian", "noise_multiplier": "9"}, "attempts": [[1, 1]]}]}, "read"),
        ({"charged": [{"event": {"kind": "unprotected", "dimension": []}, "attempts": [[1, 1]]}]}, "read|signature"),
    ],
)
def test_bytes_that_are_not_this_receipt_are_refused(changes: dict[str, object], problem: str) -> None:
    """Whoever writes the file may write anything into it: less spend, another device, a key of his own."""
    fields = json.loads(made().model_dump_json()) | changes
    with pytest.raises(ProtocolError, match=problem):
        read(json.dumps(fields).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b" " * (1 << 21)])
def test_hostile_bytes_are_a_protocol_error(content: bytes) -> None:
    """A parser's own exception would be an answer that says something, or the end of a process."""
    with pytest.raises(ProtocolError, match="receipt"):
        read(content)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_one_changed_byte_never_changes_what_is_read(data: st.DataObject) -> None:
    """A signature over something else than what is used holds for any spend."""
    content = bytearray(made().model_dump_json().encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        found = read(bytes(content))
    except ProtocolError:
        return
    assert found.charges == CHARGES


def test_an_attempt_that_is_named_twice_is_refused() -> None:
    """Signed or not: whichever event comes last would be the one that counts."""
    cheap = SampledGaussian(noise_multiplier=9.0, sampling_rate=1.0, sigma=9, dimension=10)
    one, other = made({Attempt(1, 1): STEP}), made({Attempt(1, 1): cheap})
    both = one.model_copy(update={"charged": one.charged + other.charged})
    signed = both.model_copy(update={"signature": KEY.sign(both.signed)})
    with pytest.raises(ProtocolError, match="names an attempt twice"):
        read(signed.model_dump_json().encode())


def test_a_device_cannot_be_made_to_sign_for_a_coordinator() -> None:
    """Both sides sign the same fields: the side is one of them."""
    turned = made(by="device").model_copy(update={"by": "coordinator"})
    with pytest.raises(ProtocolError, match="signature does not hold"):
        read(turned.model_dump_json().encode())


def test_keys_of_two_federations_have_nothing_in_common_and_come_back() -> None:
    """With one key for all, two coordinators that compare notes know that they talk to one device."""
    device = SigningKey.generate()
    keys = [device.derive("receipts", *names).public for names in (("f", "k"), ("g", "k"), ("f", "l"), ("fk", ""))]
    assert len({device.public, *keys}) == 5
    assert device.derive("receipts", "f", "k").public == keys[0]
