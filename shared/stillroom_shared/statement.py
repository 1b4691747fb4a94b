"""The privacy statement: what is promised, for which unit, against whom. An epsilon is never shown without these.

A statement is computed from the events of a ledger, travels in the manifest of what it covers, and prints as a paragraph
that somebody whose data it is about can read. The adversaries are those of the design: whoever reads releases cannot see
who took part in a round, so Poisson sampling amplifies; peers and network observers can, so for them it does not; the
coordinator sees single updates under `central`, so it is promised nothing. Under `local` updates are private when they leave
the device, so the same is promised against all of them, the coordinator too, for one query.


What is published after a search over settings must not tell how many trials there were, or the search is worth nothing
(`stillroom_shared.repetitions`). So against observers, who saw them all, a statement names what holds for nearly every
number that might have been drawn; what was drawn stands in the ledger, for whoever may know (`stillroom audit ledger`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stillroom_shared.accounting import AccountantName, accountant_for, epsilon
from stillroom_shared.events import (
    CorrelatedGaussian,
    Event,
    Gaussian,
    LocalGaussian,
    Selection,
    Unprotected,
    in_one_unit,
)
from stillroom_shared.mechanism import MechanismName

READERS = "readers of releases"
OBSERVERS = "peers and network observers"
COORDINATOR = "the coordinator"


class PrivacyStatement(BaseModel):
    """What a sequence of releases costs one unit. `None` stands for "no guarantee" wherever an epsilon could be.

    Attributes:
        unit: what is protected: "user" is everything one device holds, "query" one training record; "none" for the non-private
            baseline.
        epsilon: against readers of releases, by accountant; the guarantee is the PLD figure, RDP cross-checks it. After a
            search there is the RDP figure only.
        against: epsilon for each adversary, never only the smallest.
        sampling: "poisson" cohorts, or devices that take "turns", where nothing is amplified.
        participations, separation: under "turns": the most that a device joins, and how many rounds apart; the second under
            `correlated` only, where the guarantee rests on it.
        steps, record_rate: under `local`: noisy steps of a participation, and the chance of each query to be in one.
        rounds: charged; under "turns" all of the run, released or not.
        evaluations: charged; each is one more release of the same unit.
        rehearsal: the noise came from a known seed; nothing is promised to anybody who knows it.
        search: how the number of trials was drawn, where this is the best of them; None where nothing was searched for.
        trial_of: the search that these rounds are one trial of. The trial alone promises nothing: the search does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    unit: Literal["user", "query", "none"]
    adjacency: Literal["zero-out"] = "zero-out"
    mechanism: MechanismName
    noise_multiplier: float | None
    clip_norm: float | None
    sampling: Literal["poisson", "turns"] = "poisson"
    participations: int | None = None
    separation: int | None = None
    steps: int | None = None
    record_rate: float | None = None
    sampling_rate: float
    rounds: int
    evaluations: int = 0
    devices: int
    delta: float
    epsilon: dict[str, float | None]
    against: dict[str, float | None]
    rehearsal: bool
    search: str | None = None
    trial_of: str | None = None

    @property
    def accountant(self) -> AccountantName:
        """The accountant whose figure is the guarantee."""
        return "PLD" if "PLD" in self.epsilon else "RDP"

    @property
    def epsilon_pld(self) -> float:
        """The guarantee against readers of releases, by `accountant`; infinity when there is none."""
        found = self.epsilon[self.accountant]
        return math.inf if found is None else found

    def paragraph(self) -> str:
        """The statement in plain words."""
        readers = self.epsilon[self.accountant]
        if self.trial_of is not None:
            return (
                f"No guarantee by itself: one trial of the search {self.trial_of!r}. Only the best trial may be published, "
                "with the statement of the search; whoever publishes another one charges for it apart."
            )
        if self.unit != "none" and readers is None:
            return (
                "No guarantee can be certified: updates were clipped and noised, but with too little noise for any bound "
                "at this delta. Treat it as if there were no differential privacy."
            )
        if readers is None or self.unit == "none":
            return "No differential privacy: updates were neither clipped nor noised. This is a baseline for comparison only."
        if self.unit == "query":
            return " ".join([*self._of_a_query(readers), *self._rehearsed()])
        sentences = [
            f"The unit of protection is one user: everything on one of {self.devices:,} enrolled devices.",
            f"Against {READERS}, {self._charged()}{self._and_evaluations()} cost {self._figure(READERS)}:",
            "whatever somebody concludes from the released models, they would have concluded almost as likely had the "
            f"device contributed nothing; the factor is at most e to the {printed_epsilon(readers)}, "
            f"but for a chance of {self.delta:.1e}.",
            self._seen_by_observers(),
            "Against the coordinator there is no differential privacy guarantee (none): it sees single clipped updates, "
            "never queries, documents or embeddings.",
            "Not covered: how long a device takes to answer, and what other federations of the same devices release.",
        ]
        return " ".join([*sentences, *self._rehearsed()])

    def _of_a_query(self, epsilon: float) -> list[str]:
        return [
            f"The unit of protection is one query of one of {self.devices:,} enrolled devices: one record that it trains on.",
            f"Against {READERS}, {self.rounds} round{'s' * (self.rounds != 1)} cost {self._figure(READERS)}:",
            "whatever somebody concludes from the released models, they would have concluded almost as likely had that query "
            f"contributed nothing; the factor is at most e to the {printed_epsilon(epsilon)}, but for a chance of "
            f"{self.delta:.1e}.",
            f"Each device trains at most {self.participations or 0} times, {self.steps or 0} noisy steps at a time, and adds "
            "the noise before anything leaves it; a query is in a step with probability "
            f"{self.record_rate or 0:g}, which nobody else sees. So against {OBSERVERS} the figure is the same, "
            f"{self._figure(OBSERVERS)}, and against the coordinator too: "
            f"{self._figure(COORDINATOR)}.",
            "Not covered: a user as a whole, that is what all queries of a device have in common; its documents; how long it "
            "takes to answer; and what other federations of the same devices release.",
        ]

    def _rehearsed(self) -> list[str]:
        if not self.rehearsal:
            return []
        return ["Rehearsal: the randomness came from a known seed, so none of this binds anybody who knows it."]

    def _charged(self) -> str:
        """What the guarantee covers."""
        rounds = _counted(self.rounds, "round")
        if self.search is None:
            return rounds
        paid = f"{rounds} charged for a trial, its evaluation and reserved retries"
        return f"the best trial of a search over settings ({paid}), out of a hidden number of trials ({self.search}),"

    def _and_evaluations(self) -> str:
        return f" and {_counted(self.evaluations, 'evaluation')}" if self.evaluations else ""

    def _seen_by_observers(self) -> str:
        found = self._figure(OBSERVERS)
        if self.search is not None:
            return (
                f"Against {OBSERVERS}, who may see every trial and which devices take part, nothing is hidden: {found} for a "
                "device that joined every round of as many trials as may have been drawn."
            )
        if self.sampling == "turns":
            return (
                f"Devices take turns, each at most {self.participations} times and every {self.separation} rounds, so against "
                f"{OBSERVERS}, who may see whose turn it is, the figure is the same: {found}."
            )
        return (
            f"Against {OBSERVERS}, who may see which devices take part and read the releases, sampling hides nothing: "
            f"{found} for a device that joined every round{' and evaluation' if self.evaluations else ''}."
        )

    def _figure(self, adversary: str) -> str:
        value, where = self.against[adversary], f"({self.unit} level, delta {self.delta:.1e}, against {adversary})"
        return f"no guarantee {where}" if value is None else f"epsilon {printed_epsilon(value)} {where}"


def statement(
    events: Sequence[Event],
    *,
    delta: float,
    devices: int,
    sampling_rate: float,
    clip_norm: float | None,
    rehearsal: bool,
    mechanism: MechanismName = "central",
    trial_of: str | None = None,
    evaluations: int = 0,
) -> PrivacyStatement:
    """The statement for all events charged so far, released or not; `mechanism` decides where there are none yet.

    With `trial_of` it promises nothing: what the events cost depends on the search that they are a trial of.
    `evaluations` is how many of the events are evaluations; all others are rounds.

    >>> from stillroom_shared.events import SampledGaussian
    >>> step = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, sigma=2**29, dimension=9_216)
    >>> made = statement([step] * 20, delta=1e-4, devices=1_000, sampling_rate=0.5, clip_norm=0.3, rehearsal=False)
    >>> sorted((adversary, value and round(value, 2)) for adversary, value in made.against.items())
    [('peers and network observers', 10.23), ('readers of releases', 4.9), ('the coordinator', None)]
    """
    noisy = [event for event in events if not isinstance(event, Unprotected)]
    searches = [event for event in noisy if isinstance(event, Selection)]
    gaussians: list[Gaussian] = [event for event in noisy if not isinstance(event, Selection)]
    gaussians += [event for search in searches for trial in search.trials for event, _ in trial]
    protected = len(noisy) == len(events) and mechanism != "none"
    unit, counted = in_one_unit(events)
    runs = [event for event in gaussians if isinstance(event, CorrelatedGaussian | LocalGaussian)]
    correlated = [event for event in gaussians if isinstance(event, CorrelatedGaussian)]
    trained = [event for event in gaussians if isinstance(event, LocalGaussian)]
    local = mechanism == "local" and len(trained) == len(events)

    def cost(of: Sequence[Event], accountant: AccountantName = "PLD") -> float | None:
        found = epsilon(of, delta, accountant) if protected and trial_of is None else math.inf
        return found if math.isfinite(found) else None

    names: list[AccountantName] = ["PLD", "RDP"] if accountant_for(events) == "PLD" else ["RDP"]
    readers = {name: cost(counted, name) for name in names}
    unamplified = [event if isinstance(event, Unprotected) else event.without_sampling() for event in counted]
    return PrivacyStatement(
        unit=("query" if mechanism == "local" else unit) if protected else "none",
        mechanism=mechanism if protected else "none",
        sampling="turns" if runs or mechanism in ("correlated", "local") else "poisson",
        participations=max((run.participations for run in runs), default=None),
        separation=min((run.separation for run in correlated), default=None),
        steps=max((event.steps for event in trained), default=None),
        record_rate=max((event.sampling_rate for event in trained), default=None),
        noise_multiplier=min((event.noise_multiplier for event in gaussians), default=None) if protected else None,
        clip_norm=clip_norm if protected else None,
        sampling_rate=sampling_rate,
        rounds=sum(rounds_of(event) for event in events) - evaluations,
        evaluations=evaluations,
        devices=devices,
        delta=delta,
        epsilon={**readers},
        against={
            READERS: readers[names[0]],
            OBSERVERS: cost(unamplified),
            COORDINATOR: readers[names[0]] if local else None,
        },
        rehearsal=rehearsal,
        search="; ".join(search.repetitions.words for search in searches) or None,
        trial_of=trial_of,
    )


def rounds_of(event: Event) -> int:
    """How many rounds one charge pays for: of a search, those of its longest trial, evaluation included."""
    if isinstance(event, Selection):
        return max(sum(rounds_of(part) * count for part, count in trial) for trial in event.trials)
    return event.rounds if isinstance(event, CorrelatedGaussian | LocalGaussian) else 1


def printed_epsilon(value: float) -> str:
    """Two digits, rounded up: a guarantee is never printed better than it is.

    >>> printed_epsilon(1.0001), printed_epsilon(math.inf)
    ('1.01', 'infinity')
    """
    if math.isinf(value):
        return "infinity"
    return f"{math.ceil(value * 100) / 100:.2f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
