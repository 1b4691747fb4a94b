"""A private search over settings: the best of a random number of trials, charged for as a whole before the first one.

Trying settings on private data and keeping the best is itself a release of private data. Here the settings of each trial are
drawn blindly from a public list, the number of trials K from a distribution that is fixed beforehand, and only the trial with
the best private score is sealed, with a statement that counts the whole search (Papernot and Steinke 2022, arXiv 2110.03620;
`stillroom_shared.repetitions` states theorems and assumptions).

Guarantees:
    - One row of the ledger charges the search and holds K and the settings of every trial. It is durable before the first
      trial, so a crash never draws again, and a search is drawn once in its home.
    - Trials run under the events that were charged: these are computed again at every start and compared.
    - One process at a time runs a search; another one waits, and finds what is left.
    - What lies in the published adapter follows from the plan and the best trial: not K, not when, not what went wrong. A
      trial that is interrupted in its middle goes on from retries that were charged beforehand, whether used or not.
    - A score is a private output of its trial: the events of a trial include those of the evaluation that scores it.

Whoever sees trials (devices, the network, readers of this ledger and of the trials' own ledgers) has no discount: for them the
trials are plain composition, which their ledgers hold (`stillroom audit ledger`).

| case | result |
|---|---|
| K = 0, possible under Poisson | nothing is sealed; the release stays as it is |
| the process ends between two trials | the next start goes on with the next one |
| the process ends within a trial | that trial goes on, at the cost of a reserved retry; without one left: `BudgetError` |
| trials would now release something else than was charged | `LedgerError`, nothing is run |
| a score that is not finite | loses against every other |
| equal scores | the first one wins |
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom_server.search_plan import SearchPlan, Trials
from stillroom_shared.adapter import Adapter
from stillroom_shared.closing import Closing
from stillroom_shared.errors import BudgetError, LedgerError
from stillroom_shared.events import Event, Selection
from stillroom_shared.files import exclusive
from stillroom_shared.ledger import Ledger
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import ADAPTER_NAME, AdapterManifest, seal_adapter
from stillroom_shared.sealed import open_sealed
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement

LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "coordinator.key"
SELECTED_FOLDER = "selected"
TRIALS_FOLDER = "trials"


class Search(Closing):
    """One search in one home: plan, key, ledger. Use as a context manager."""

    def __init__(self, home: Path, trials: Trials, *, release_id: str) -> None:
        self.home = home
        self.plan = SearchPlan.load(home)
        self._trials = trials
        self._release = release_id
        self.key = SigningKey.load_or_generate(home / KEY_FILE)
        about = {"search": self.plan.search, "plan": self.plan.content_hash}
        self.ledger = Ledger.create(home / LEDGER_FILE, key=self.key, about=about)

    def run(self, on_trial: Callable[[int, int], None] = lambda done, trials: None) -> Path | None:
        """Charge, draw, run what is left, and seal the best trial; where it is, or None when none was drawn.

        Raises:
            LedgerError: what trials release is not what this search was charged for; nothing is run then.
            BudgetError: the search does not fit its budget, or no retry is left for the trial that was interrupted.
        """
        (self.home / TRIALS_FOLDER).mkdir(exist_ok=True)
        with exclusive(self.home / TRIALS_FOLDER):
            return self._run(on_trial)

    def _run(self, on_trial: Callable[[int, int], None]) -> Path | None:
        reserved, search = self._events()
        drawn = self._drawn()
        if drawn is None:
            drawn = self._charge(reserved, search)
        for number, index in enumerate(drawn, start=1):
            if number not in {note["trial"] for note in notes(self.ledger, "finished")}:
                candidate = self.plan.candidates[index]
                self._begin(number)
                outcome = self._trials.run(candidate, number)
                score = outcome.score if math.isfinite(outcome.score) else None
                found = open_sealed(outcome.folder, AdapterManifest, trusted_key=None)
                folder = os.path.relpath(outcome.folder, self.home)
                self.ledger.record(
                    {"finished": {"trial": number, "score": score, "folder": folder, "adapter": found.id}}
                )
            on_trial(number, len(drawn))
        return self._seal() if drawn else None

    def statement(self) -> PrivacyStatement:
        """What has been spent, from the ledger's events."""
        return self.plan.statement(self.ledger.events())

    @property
    def best(self) -> dict[str, Any] | None:
        """Number and settings of the best trial so far; None before the first, or when none was drawn."""
        if not (finished := notes(self.ledger, "finished")):
            return None
        number, drawn = best_of(finished)["trial"], self._drawn() or []
        return {"trial": number, "settings": dict(self.plan.candidates[drawn[number - 1]])}

    def _events(self) -> tuple[list[Event], Selection]:
        """What the search costs, as its trials are now; refused where anything else was charged already."""
        reserved, search = self.plan.events(self._trials)
        charged = self.ledger.events()
        if charged != [*reserved, search][: len(charged)]:
            raise LedgerError(
                f"{self.ledger.path} was charged for other events than its trials would release now: go on with the rounds, "
                "the evaluation, the devices and the version that it began with; or begin another search in another home, "
                "and both are charged"
            )
        return reserved, search

    def _charge(self, reserved: Sequence[Event], search: Selection) -> list[int]:
        """Pay for the search and its retries, and draw: the last row holds both, so that neither is without the other."""
        self.plan.budget.check([*reserved, search])
        for place in range(len(self.ledger.events()), len(reserved)):
            self._spend(reserved[place], {"reserved": place})
        randomness = Randomness() if self.plan.seed is None else Randomness(seed=f"{self.plan.seed}/search")
        count = search.repetitions.draw(randomness)
        drawn = [randomness.below(len(self.plan.candidates)) for _ in range(count)]
        self._spend(search, {"drawn": drawn})
        return drawn

    def _spend(self, event: Event, purpose: dict[str, Any]) -> None:
        """Charge the next part of the search, unless somebody else did meanwhile."""
        known = len(self.ledger.events())

        def once(earlier: list[dict[str, Any]]) -> None:
            if len(earlier) != known or any("drawn" in other or other == purpose for other in earlier):
                raise LedgerError(
                    f"{self.ledger.path} holds a search that was charged meanwhile: run the command again"
                )

        self.ledger.spend(event, budget=self.plan.budget, purpose=purpose, allowed=once)

    def _drawn(self) -> list[int] | None:
        return next((list(purpose["drawn"]) for purpose in self.ledger.purposes() if "drawn" in purpose), None)

    def _begin(self, number: int) -> None:
        """Note that a trial begins or goes on; the second is refused when no reserved retry is left."""

        def paid_for(earlier: list[dict[str, Any]]) -> None:
            begun = [note["began"]["trial"] for note in earlier if "began" in note]
            used = sum(count - 1 for count in Counter(begun).values())
            if number in begun and used >= self.plan.retries:
                raise BudgetError(
                    f"trial {number} was interrupted and none of {self.plan.retries} reserved retries is left: going on is "
                    "not paid for; begin another search in another home, with more retries, and both are charged"
                )

        # Read and written in one transaction: of two processes that begin together, one is an interruption.
        self.ledger.record({"began": {"trial": number}}, allowed=paid_for)

    def _seal(self) -> Path:
        """Seal the best trial's adapter with the statement of the search."""
        folder = self.home / SELECTED_FOLDER
        if folder.exists():
            return folder
        best = best_of(notes(self.ledger, "finished"))
        source = self.home / best["folder"]
        found = open_sealed(source, AdapterManifest, trusted_key=None)
        if found.id != best["adapter"]:
            raise LedgerError(
                f"{source} is not what trial {best['trial']} released: restore it, it cannot be had again for free"
            )
        seal_adapter(
            folder,
            Adapter.load(source / ADAPTER_NAME),
            release_id=self._release,
            round=found.round,
            statement=self.statement().model_dump(mode="json"),
            key=self.key,
        )
        return folder

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


def notes(ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """What the notes of this name say, in order."""
    return [row.fields[name] for row in ledger.rows() if row.kind == "note" and name in row.fields]


def best_of(finished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The note of the best trial; of equals, the first one's."""
    return max(sorted(finished, key=lambda note: note["trial"]), key=lambda note: _score(note))


def _score(note: Mapping[str, Any]) -> float:
    return -math.inf if note["score"] is None else float(note["score"])
