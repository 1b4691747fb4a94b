"""`stillroom audit ledger A B ...`: searches, and what several ledgers over the same devices cost together.

Releases, further runs and searches over the same devices add up, whoever coordinates them: against readers of all that was
released, the joint epsilon composes every event of every ledger at one delta. A sum over ledgers whose devices only overlap is
still sound: it holds for a device in all of them, and others paid less.

| break | found by |
|---|---|
| anything that `stillroom_simulations.audit` finds in one of the ledgers | the same checks |
| a search whose trials released more than it was charged for | the trials' own ledgers |
| a trial that was not drawn, or that ran with other settings than it drew | the row of the draw, the trial's own plan |
| trials that were charged for as if they cost something else | the search's plan, computed again |
| a sealed outcome that is not the best trial's, or that claims less than the search cost | its bytes, its statement |
| one ledger given twice, or a copy of it | its first row |
| a trial given without its search: it costs what the search costs | its plan |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom_server.plan import Plan
from stillroom_server.search import LEDGER_FILE, SELECTED_FOLDER, TRIALS_FOLDER, best_of, notes
from stillroom_server.search_plan import PLAN_FILE, Candidate, SearchPlan
from stillroom_shared.accounting import accountant_for, epsilon
from stillroom_shared.errors import LedgerError, SettingsError, StillroomError
from stillroom_shared.events import Event, Selection, Unit, Unprotected, in_one_unit, selection_of
from stillroom_shared.ledger import Ledger, Row
from stillroom_shared.release import ADAPTER_NAME, AdapterManifest
from stillroom_shared.sealed import open_sealed
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS, PrivacyStatement, printed_epsilon
from stillroom_simulations.audit import audit_ledger, misstated, stated_in


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one verified ledger was charged for: `released` as readers see it, `observed` as observers saw it.

    Attributes:
        statement: of this ledger alone.
        trials: how many trials a search ran; None for a federation.
    """

    path: Path
    rows: int
    first: str
    head: str
    delta: float
    statement: PrivacyStatement
    released: tuple[Event, ...]
    observed: tuple[Event, ...]
    trials: int | None = None


@dataclass(frozen=True, kw_only=True)
class JointAudit:
    """Several ledgers, and what they cost together at one delta; None is "no guarantee".

    Where one of them protects queries only, so does the sum (`stillroom_shared.events.in_one_unit`).
    """

    ledgers: tuple[Spent, ...]
    unit: Unit
    delta: float
    against: dict[str, float | None]
    accountant: str

    def text(self) -> str:
        """One line for each ledger, and the joint guarantee in words."""
        lines = [f"{spent.path}: {spent.rows} rows verified, head {spent.head}" for spent in self.ledgers]
        lines += [f"  {spent.path.name} alone: {_alone(spent)}" for spent in self.ledgers]
        lines += [
            "",
            f"Together, for a device that is enrolled in all {len(self.ledgers)} ({self.accountant}):",
            f"  {self._line(READERS, self.against[READERS])}",
            f"  {self._line(OBSERVERS, self.against[OBSERVERS])}",
            f"  against {COORDINATOR}: none",
        ]
        if any(spent.statement.rehearsal for spent in self.ledgers):
            lines.append(
                "Rehearsal: some of the noise came from a known seed, and hides nothing from whoever knows it."
            )
        return "\n".join(lines)

    def _line(self, adversary: str, value: float | None) -> str:
        return _figure(value, self.unit, self.delta, adversary)


def audit_jointly(paths: Sequence[Path], *, public_key: str | None = None, delta: float | None = None) -> JointAudit:
    """Verify every ledger with what lies beside it, and compose all their events at one delta.

    Args:
        paths: homes of coordinators and of searches; no trial by itself.
        delta: of the joint guarantee; the smallest of the plans' without it.

    Raises:
        LedgerError: naming the ledger, and the row or the adapter, that does not hold.
        SettingsError: a path that is given twice, or that is a trial of a search.
    """
    ledgers = tuple(_spent(path, public_key) for path in paths)
    seen: dict[str, Path] = {}
    for spent in ledgers:
        if (other := seen.setdefault(spent.first, spent.path)) is not spent.path:
            raise SettingsError(f"{spent.path} and {other} are one ledger or copies of it: name each ledger once")
    at = min(spent.delta for spent in ledgers) if delta is None else delta
    unit, released = in_one_unit([event for spent in ledgers for event in spent.released])
    _, observed = in_one_unit([event for spent in ledgers for event in spent.observed])
    return JointAudit(
        ledgers=ledgers,
        unit=unit,
        delta=at,
        against={READERS: _cost(released, at), OBSERVERS: _cost(observed, at), COORDINATOR: None},
        accountant=accountant_for(released),
    )


def audit_search(home: Path, *, public_key: str | None = None, head: str | None = None) -> Spent:
    """Verify a search: its ledger, the ledgers of its trials, and what it sealed. Raises `LedgerError` on any break."""
    plan = SearchPlan.load(home)
    with Ledger.open(home / LEDGER_FILE, public_key=public_key) as ledger:
        ledger.verify()
        rows, events, purposes = ledger.rows(), ledger.events(), ledger.purposes()
        begun, finished = notes(ledger, "began"), notes(ledger, "finished")
    if head is not None and head.lower() not in {row.hash for row in rows}:
        raise LedgerError(f"{home} lacks the row of hash {head}: rows were cut off; restore the newest copy")
    if rows[0].fields["about"].get("plan") != plan.content_hash:
        raise LedgerError(f"{home / LEDGER_FILE} began with another plan than {home / PLAN_FILE}: restore the original")
    drawn = [purpose["drawn"] for purpose in purposes if "drawn" in purpose]
    searches = [event for event in events if isinstance(event, Selection)]
    if len(drawn) > 1 or len(searches) != len(drawn) or any(own.repetitions != plan.repetitions for own in searches):
        raise LedgerError(
            f"{home} was drawn {len(drawn)} times, for {len(searches)} charges of its plan: it may be once"
        )
    draw = [int(index) for own in drawn for index in own]
    if not set(draw) <= set(range(len(plan.candidates))):
        raise LedgerError(
            f"{home} drew {draw}, of {len(plan.candidates)} candidates: its plan is not the one it drew from"
        )
    count = len(draw)
    observed = _trials(home, plan, draw, {note["trial"] for note in begun}, events, key=str(rows[0].fields["key"]))
    made = plan.statement(events)
    _check_sealed(home, made, finished, count, rows)
    return Spent(
        path=home, rows=len(rows), first=rows[0].hash, head=rows[-1].hash, delta=plan.delta, statement=made,
        released=tuple(events), observed=tuple(observed), trials=len({note["trial"] for note in begun}),
    )  # fmt: skip


def observed_words(spent: Spent) -> str:
    """What those are promised who saw the trials of a search: K is no secret to them."""
    figure = _figure(_cost(spent.observed, spent.delta), "user", spent.delta, OBSERVERS)
    return (
        f"{spent.trials} trials were run; whoever saw them, or reads this ledger, has no discount: {figure}. Do not publish "
        f"that number: the guarantee against {READERS} hides it."
    )


def is_search(path: Path) -> bool:
    """Whether this is the home of a search."""
    return (path / PLAN_FILE).is_file()


def _spent(path: Path, public_key: str | None) -> Spent:
    if is_search(path):
        return audit_search(path, public_key=public_key)
    found = audit_ledger(path, public_key=public_key)
    home = path if path.is_dir() else path.parent
    if (search := Plan.load(home).trial_of) is not None:
        raise SettingsError(f"{path} is a trial of {search!r} and costs what that search costs: name the search's home")
    with Ledger.open(path / LEDGER_FILE if path.is_dir() else path, public_key=public_key) as ledger:
        events, first = ledger.events(), ledger.rows()[0].hash
    return Spent(
        path=path, rows=found.rows, first=first, head=found.head, delta=found.statement.delta, statement=found.statement,
        released=tuple(events), observed=tuple(_unsampled(events)),
    )  # fmt: skip


def _trials(
    home: Path, plan: SearchPlan, drawn: Sequence[int], begun: set[int], charged: Sequence[Event], *, key: str
) -> list[Event]:
    """What observers of the trials saw, each ledger verified: each ran what it drew, and no more than was charged for."""
    searches = [event for event in charged if isinstance(event, Selection)]
    reserved: Counter[Event] = Counter(event for event in charged if not isinstance(event, Selection))
    observed: list[Event] = []
    folders = {path.name: path for path in sorted((home / TRIALS_FOLDER).glob("*")) if path.is_dir()}
    known = {f"{number:04d}" for number in begun if number <= len(drawn)}
    if strange := sorted(set(folders) - known):
        raise LedgerError(
            f"{folders[strange[0]]} is no trial that {home / LEDGER_FILE} drew and began: what was seen is unknown"
        )
    for name in sorted(known):
        if not (home / TRIALS_FOLDER / name / LEDGER_FILE).is_file():
            continue  # it began and was not charged for yet
        path = home / TRIALS_FOLDER / name
        audit_ledger(path, public_key=key)
        due = _drawn_events(path, plan, int(name), plan.candidates[drawn[int(name) - 1]])
        if any(selection_of([due], search.repetitions).trials[0] not in search.trials for search in searches):
            raise LedgerError(f"{path} is a trial that releases {due[0]} and more, which {home} was not charged for")
        with Ledger.open(path / LEDGER_FILE) as ledger:
            events = ledger.events()
        beyond = Counter(events) - Counter(due)
        if beyond - reserved:
            raise LedgerError(
                f"{path} released {next(iter(beyond - reserved))}, which the search neither charged nor reserved: its "
                "guarantee does not hold"
            )
        reserved -= beyond
        observed += _unsampled(events)
    return observed


def _drawn_events(path: Path, search: SearchPlan, number: int, candidate: Candidate) -> list[Event]:
    """What a trial may release, after its plan was found to be what the candidate makes of the search's plan."""
    # Loads torch, which the audit of a federation need not wait for.
    from stillroom_simulations.trial_plan import TrialBase, names_hash

    base, found = TrialBase.of(search), Plan.load(path)
    due = base.plan(search, candidate, number, enrolled=found.enrolled, release_folder=found.release_folder)
    told, ran = due.model_dump(), found.model_dump()
    if names_hash(found.enrolled) != base.devices:
        raise LedgerError(f"{path} enrolled other devices than the search {search.search!r} was charged for")
    if other := [f"{name} {ran[name]} in place of {told[name]}" for name in told if ran[name] != told[name]]:
        raise LedgerError(
            f"{path} is not the trial {number} of {search.search!r} that was drawn, {dict(candidate)}: it has {other[0]}"
        )
    return base.events(due)


def _check_sealed(
    home: Path, made: PrivacyStatement, finished: Sequence[dict[str, object]], count: int, rows: Sequence[Row]
) -> None:
    folder = home / SELECTED_FOLDER
    if not folder.exists():
        return
    manifest = open_sealed(folder, AdapterManifest, trusted_key=str(rows[0].fields["key"]))
    stated = stated_in(folder, manifest)
    if len(finished) != count or not count:
        raise LedgerError(
            f"{folder} was sealed after {len(finished)} of {count} drawn trials: it is no outcome of the search"
        )
    if misstated(stated, made):
        raise LedgerError(
            f"{folder} states {stated.against}, the search cost {made.against}: do not trust that adapter"
        )
    best = best_of(list(finished))
    try:
        source = open_sealed(home / str(best["folder"]), AdapterManifest, trusted_key=None)
    except StillroomError as error:
        raise LedgerError(f"trial {best['trial']} is not what was scored: {error}") from error
    if source.id != best["adapter"] or source.files[ADAPTER_NAME] != manifest.files[ADAPTER_NAME]:
        raise LedgerError(f"{folder} is not what the best trial, number {best['trial']}, released: do not trust it")


def _unsampled(events: Sequence[Event]) -> list[Event]:
    return [event if isinstance(event, Unprotected) else event.without_sampling() for event in events]


def _alone(spent: Spent) -> str:
    return _figure(spent.statement.against[READERS], spent.statement.unit, spent.delta, READERS)


def _figure(value: float | None, unit: str, delta: float, adversary: str) -> str:
    figure = "no guarantee" if value is None else f"epsilon {printed_epsilon(value)}"
    return f"{figure} ({unit} level, delta {delta:.1e}, against {adversary})"


def _cost(events: Sequence[Event], delta: float) -> float | None:
    found = epsilon(events, delta)
    return found if math.isfinite(found) else None
