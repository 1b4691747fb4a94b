"""The device keeps its participations few and far apart, whatever the server asks for."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from stillroom_client.separation import Turn, require_turn
from stillroom_server.cohort import Rotation
from stillroom_shared.accounting import epsilon
from stillroom_shared.correlated import Correlated
from stillroom_shared.errors import BudgetError
from stillroom_shared.ledger import Ledger
from stillroom_shared.signing import SigningKey


def turn(number: int, attempt: int = 1, **changes: object) -> Turn:
    fields: dict[str, object] = {
        "federation": "f",
        "round": number,
        "attempt": attempt,
        "separation": 4,
        "participations": 3,
    }
    return Turn(**(fields | changes))  # type: ignore[arg-type]


def test_a_server_that_asks_at_random_gets_no_more_than_the_noise_covers() -> None:
    """Whatever is asked for in whatever order, what is answered keeps both limits; and something is answered."""
    generator, reached = random.Random(0), 0
    for _ in range(300):
        joined: list[dict[str, object]] = []
        for _ in range(40):
            asked = turn(generator.randint(1, 20), generator.randint(1, 3))
            try:
                require_turn(asked, joined)
            except BudgetError:
                continue
            joined.append(asked.purpose())
        rounds = sorted({int(str(purpose["round"])) for purpose in joined})
        assert len(rounds) <= 3 and all(later - earlier >= 4 for earlier, later in pairwise(rounds))
        assert len({(purpose["round"], purpose["attempt"]) for purpose in joined}) == len(joined)
        reached += len(rounds) == 3
    assert reached > 30, "the cap was hardly ever reached: the test would pass for a device that refuses everything"


def test_a_round_too_early_or_beyond_the_cap_is_declined() -> None:
    """One round too early makes two updates of one device meet in a row."""
    joined = [turn(2).purpose(), turn(6).purpose()]
    for number in (7, 8, 9):
        with pytest.raises(BudgetError, match=f"comes {number - 6} rounds after round 6"):
            require_turn(turn(number), joined)
    require_turn(turn(10), joined)
    with pytest.raises(BudgetError, match="would be participation 4: the noise covers 3"):
        require_turn(turn(14), [*joined, turn(10).purpose()])
    with pytest.raises(BudgetError, match="would be participation 1: the noise covers 0"):
        require_turn(turn(1, participations=0), [])


def test_rounds_do_not_go_back() -> None:
    """An earlier round is either over, so that its row is out, or a copy of the server that was restored."""
    joined = [turn(1).purpose(), turn(9).purpose()]
    for number in (1, 5):
        with pytest.raises(BudgetError, match=f"comes {number - 9} rounds after round 9"):
            require_turn(turn(number, 2), joined)


def test_a_retry_is_a_later_attempt_at_the_same_round() -> None:
    """A retry that counts as a participation would end a device's run early; the same attempt twice is two updates."""
    joined = [turn(2).purpose(), turn(6).purpose(), turn(10).purpose(), turn(10, 2).purpose()]
    require_turn(turn(10, 3), joined)
    require_turn(turn(10, 7), joined)
    for attempt in (1, 2):
        with pytest.raises(BudgetError, match="attempt 2 was answered already"):
            require_turn(turn(10, attempt), joined)


def test_limits_that_change_are_declined_and_other_federations_do_not_count() -> None:
    """The noise was computed for the first limits; looser ones later are a broken promise."""
    joined = [turn(2).purpose(), {"federation": "g", "round": 5, "attempt": 1}]
    for changes in ({"separation": 2}, {"participations": 9}):
        with pytest.raises(BudgetError, match="limits of a run never change"):
            require_turn(turn(6, **changes), joined)
    require_turn(turn(3, federation="h"), joined)
    require_turn(turn(6), joined)


def test_a_round_that_was_replayed_from_a_receipt_counts() -> None:
    """A receipt names no limits; a device that forgot the round, or never joined again, would be wrong either way."""
    replayed = [{"federation": "g", "round": 5, "attempt": 1}]
    require_turn(turn(9, federation="g"), replayed)
    with pytest.raises(BudgetError, match="comes 1 rounds after round 5"):
        require_turn(turn(6, federation="g"), replayed)


def test_a_run_by_turns_passes_the_devices_and_their_ledgers_hold_what_it_cost(tmp_path: Path) -> None:
    """Both sides together: the rotation never asks what a device declines, and the device's sum is that of the run."""
    rounds, separation = 10, 4
    cap = math.ceil(rounds / separation)
    names = tuple(f"device-{i}" for i in range(8))
    rotation = Rotation(federation="f", enrolled=names, separation=separation, participations=cap)
    mechanism = Correlated(
        clip_norm=1.0, noise_multiplier=2.0, coefficients=(1024, 600, 500, 400), participations=cap, separation=separation,
        rounds=rounds, devices=len(names), dimension=2,
    )  # fmt: skip
    spent = {}
    for name in names:
        with Ledger.create(tmp_path / f"{name}.sqlite3", key=SigningKey.generate(), about={"device": True}) as ledger:
            for number in (n for n in range(1, rounds + 1) if name in rotation.cohort(n)):
                now = turn(number)
                ledger.spend(
                    mechanism.participation_event(),
                    budget=None,
                    purpose=now.purpose(),
                    allowed=lambda joined, now=now: require_turn(now, joined),  # type: ignore[misc]
                )
                with pytest.raises(BudgetError, match="answered already"):
                    ledger.spend(
                        mechanism.participation_event(),
                        budget=None,
                        purpose=now.purpose(),
                        allowed=lambda joined, now=now: require_turn(now, joined),  # type: ignore[misc]
                    )
            spent[name] = (len(ledger.events()), epsilon(ledger.events(), 1e-3))
    whole = epsilon([mechanism.event()], 1e-3)
    assert {count for count, _ in spent.values()} == {2, 3}
    # A third participation, in row 9 or 10, moves fewer rows than a device knows: its own sum is a little larger.
    assert all((cost < whole) if count == 2 else (whole <= cost < 1.15 * whole) for count, cost in spent.values())
