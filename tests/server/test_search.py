"""A search charges before it looks, draws once, hides how often it tried, and seals the best with what all of it cost."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY_SPEC

from stillroom_server.search import LEDGER_FILE, Search, notes
from stillroom_server.search_costs import calibrate_search, plan_tuning, repetitions_of, search_cost
from stillroom_server.search_plan import Candidate, Outcome, SearchPlan
from stillroom_shared.accounting import epsilon
from stillroom_shared.adapter import Adapter
from stillroom_shared.errors import BudgetError, LedgerError, SettingsError
from stillroom_shared.events import Event, SampledGaussian, Selection, selection_of
from stillroom_shared.ledger import Ledger
from stillroom_shared.mechanism import RESOLUTION, Central
from stillroom_shared.protocol import EvaluationOrder
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import AdapterManifest, seal_adapter
from stillroom_shared.repetitions import Poisson
from stillroom_shared.sealed import open_sealed
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement, printed_epsilon

DEVICES = 50
CANDIDATES = ({"step": "0.5"}, {"step": "1.0"}, {"step": "2.0"})


class Killed(BaseException):
    """The process ends."""


class NoisyMeans:
    """A trial: the noisy mean of the devices' vectors, stretched by the candidate; the private score is how near it comes."""

    def __init__(self, home: Path, *, scores: Sequence[float] | None = None, evaluation_noise: float = 8.0) -> None:
        self.home, self.scores, self.asked = home, scores, []  # type: tuple[Path, Sequence[float] | None, list[tuple[int, str]]]
        common = {"sampling_rate": 1.0, "devices": DEVICES, "clip_norm": 1.0}
        self.rounds = Central(dimension=TINY_SPEC.size, noise_multiplier=8.0, **common)  # type: ignore[arg-type]
        self.evaluation = Central(dimension=1, noise_multiplier=evaluation_noise, **common)  # type: ignore[arg-type]
        self.kill: int | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    def events(self, candidate: Candidate) -> list[Event]:
        return [self.rounds.event(), self.evaluation.event()]

    def retry(self, candidate: Candidate) -> list[Event]:
        return [self.rounds.event(), self.evaluation.event()]

    def run(self, candidate: Candidate, number: int) -> Outcome:
        with Ledger.open(self.home / LEDGER_FILE) as ledger:
            assert any(isinstance(event, Selection) for event in ledger.events()), "a trial before it was charged for"
        self.asked.append((number, candidate["step"]))
        self.meanwhile()
        if self.kill == number:
            raise Killed
        update = self.rounds.bound(np.full(TINY_SPEC.size, 0.01, np.float32)).astype(np.int64) * DEVICES
        mean = self.rounds.release(update, Randomness()).update * float(candidate["step"])
        near = np.array([1 - abs(float(candidate["step"]) - 1) / 2], np.float32)
        total = self.evaluation.bound(near).astype(np.int64) * DEVICES
        score = float(self.evaluation.release(total, Randomness()).update[0])
        folder = self.home / "trials" / f"{number:04d}-{len(self.asked)}"
        seal_adapter(
            folder, Adapter(TINY_SPEC, mean.astype(np.float32)), release_id="r", round=1, statement=None,
            key=SigningKey.generate(),
        )  # fmt: skip
        return Outcome(self.scores[number - 1] if self.scores else score, folder)


def make_plan(home: Path, **changes: object) -> SearchPlan:
    plan = SearchPlan.model_validate(
        {
            "search": "spring", "candidates": CANDIDATES, "mean_trials": 6.0, "budget_epsilon": 5.0, "delta": 1e-4,
            "devices": DEVICES, "sampling_rate": 1.0, "clip_norm": 1.0, "rehearsal": True, "seed": "toy",
        }
        | changes
    )  # fmt: skip
    plan.save(home)
    return plan


def open_search(home: Path, trials: NoisyMeans) -> Search:
    return Search(home, trials, release_id="r")


def test_a_search_is_charged_once_as_a_whole_and_the_best_is_sealed_with_its_cost(tmp_path: Path) -> None:
    """The statement of the best trial alone would claim the epsilon of one trial."""
    plan, trials = make_plan(tmp_path), NoisyMeans(tmp_path, scores=[0.1, 0.9, 0.3, 0.9, float("nan")] + [0.0] * 100)
    with open_search(tmp_path, trials) as search:
        folder = search.run()
        assert folder == tmp_path / "selected"
        reserved, event = plan.events(trials)
        assert search.ledger.events() == [*reserved, event]
        cost = epsilon([*reserved, event], plan.delta)
        assert cost > epsilon(trials.events({}), plan.delta, "RDP")
        manifest = open_sealed(folder, AdapterManifest, trusted_key=search.key.public)
        stated = PrivacyStatement.model_validate(manifest.statement)
        assert stated == search.statement() and stated.epsilon_pld == pytest.approx(cost)
        assert len(trials.asked) >= 4, "choose another seed"
        best = open_sealed(tmp_path / "trials" / "0002-2", AdapterManifest, trusted_key=None)
        assert manifest.files == best.files, "of equal scores, the first"
        assert "search over settings" in stated.paragraph()


def test_running_again_neither_draws_nor_charges_nor_tries_again(tmp_path: Path) -> None:
    """A search that can be repeated until its outcome pleases is a larger search than the one that was charged."""
    make_plan(tmp_path, seed=None, rehearsal=False)
    trials = NoisyMeans(tmp_path)
    with open_search(tmp_path, trials) as search:
        first, rows, asked = search.run(), len(search.ledger.rows()), len(trials.asked)
    with open_search(tmp_path, trials) as search:
        assert search.run() == first
        assert (len(search.ledger.rows()), len(trials.asked)) == (rows, asked)
    with pytest.raises(SettingsError, match="holds another search"):
        make_plan(tmp_path, mean_trials=9.0)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_search_goes_on_with_the_same_draw(tmp_path: Path, at: int) -> None:
    """A crash that lets the operator draw K or the settings again is a search with as many draws as he likes."""
    make_plan(tmp_path, seed=None, rehearsal=False, mean_trials=40.0, shape=2.0)
    trials = NoisyMeans(tmp_path)
    trials.kill = at
    with open_search(tmp_path, trials) as search, pytest.raises(Killed):
        search.run()
    with Ledger.open(tmp_path / LEDGER_FILE) as ledger:
        [drawn] = [purpose["drawn"] for purpose in ledger.purposes() if "drawn" in purpose]
        charged = ledger.events()
    trials.kill = None
    with open_search(tmp_path, trials) as search:
        search.run()
        assert search.ledger.events() == charged, "retries were charged beforehand"
    steps = [CANDIDATES[index]["step"] for index in drawn]
    assert trials.asked == [*enumerate(steps[:at], 1), *enumerate(steps[at - 1 :], at)]


@pytest.mark.parametrize("noise", [2.0, 16.0])
def test_a_search_never_goes_on_under_events_that_it_was_not_charged_for(tmp_path: Path, noise: float) -> None:
    """Charged with a noisy evaluation, then resumed with one that tells almost everything."""
    make_plan(tmp_path)
    trials = NoisyMeans(tmp_path)
    trials.kill = 1
    with open_search(tmp_path, trials) as search, pytest.raises(Killed):
        search.run()
    other = NoisyMeans(tmp_path, evaluation_noise=noise)
    with open_search(tmp_path, other) as search:
        rows = len(search.ledger.rows())
        with pytest.raises(LedgerError, match="was charged for other events than its trials would release now"):
            search.run()
        assert other.asked == [] and len(search.ledger.rows()) == rows, "nothing is run, nothing is written"
    trials.kill = None
    with open_search(tmp_path, trials) as search:
        assert search.run() is not None


def test_half_a_charge_of_other_events_is_not_completed(tmp_path: Path) -> None:
    """Retries that were reserved with much noise, in front of trials that retry with little."""
    plan, trials = make_plan(tmp_path), NoisyMeans(tmp_path)
    reserved, _ = plan.events(trials)
    other = NoisyMeans(tmp_path, evaluation_noise=2.0)
    with open_search(tmp_path, other) as search:
        for place, event in enumerate(reserved):
            search.ledger.spend(event, budget=plan.budget, purpose={"reserved": place})
        with pytest.raises(LedgerError, match="was charged for other events"):
            search.run()
        assert other.asked == [] and search.ledger.events() == reserved


def together(*calls: Callable[[], object]) -> list[BaseException | None]:
    """What each call raised, all started at once, each in its own thread."""
    start, raised = threading.Barrier(len(calls)), [None] * len(calls)  # type: threading.Barrier, list[BaseException | None]

    def one(place: int) -> None:
        start.wait()
        try:
            calls[place]()
        except BaseException as error:
            raised[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_of_two_that_begin_one_trial_at_once_the_second_needs_a_retry(tmp_path: Path) -> None:
    """Read, then written: both see that nobody began, and both run the trial for the price of one."""
    for attempt in range(8):
        home = tmp_path / str(attempt)
        make_plan(home, retries=0)
        trials = NoisyMeans(home)
        open_search(home, trials).close()

        def begin(home: Path = home, trials: NoisyMeans = trials) -> None:
            with open_search(home, trials) as search:
                search._begin(1)

        raised = together(begin, begin, begin)
        assert sum(error is None for error in raised) == 1, raised
        assert sum(isinstance(error, BudgetError) for error in raised) == 2, raised
        with Ledger.open(home / LEDGER_FILE) as ledger:
            assert notes(ledger, "began") == [{"trial": 1}]


def test_two_processes_run_one_search_once(tmp_path: Path) -> None:
    """Two that run the same trial side by side release it twice; with a retry to spare, neither is refused."""
    make_plan(tmp_path, retries=3)
    trials = NoisyMeans(tmp_path)
    open_search(tmp_path, trials).close()
    crossing = threading.Lock()
    met: list[bool] = []

    def alone() -> None:
        met.append(crossing.acquire(timeout=0.02))
        threading.Event().wait(0.05)
        if met[-1]:
            crossing.release()

    trials.meanwhile = alone

    def run() -> None:
        with open_search(tmp_path, trials) as search:
            assert search.run() is not None

    assert together(run, run, run) == [None] * 3
    assert all(met)
    with Ledger.open(tmp_path / LEDGER_FILE) as ledger:
        [drawn] = [purpose["drawn"] for purpose in ledger.purposes() if "drawn" in purpose]
        began = [note["trial"] for note in notes(ledger, "began")]
    assert began == [number for number, _ in trials.asked] == list(range(1, len(drawn) + 1))


def test_going_on_with_a_trial_is_paid_for_beforehand_or_refused(tmp_path: Path) -> None:
    """A trial that may be begun again for free is run until it scores well."""
    make_plan(tmp_path, retries=2)
    trials = NoisyMeans(tmp_path)
    trials.kill = 1
    for _ in range(3):
        with open_search(tmp_path, trials) as search, pytest.raises(Killed):
            search.run()
    with open_search(tmp_path, trials) as search, pytest.raises(BudgetError, match="none of 2 reserved retries"):
        search.run()
    assert len(trials.asked) == 3
    costs = []
    for retries in (0, 1, 2):
        reserved, event = make_plan(tmp_path / str(retries), retries=retries).events(trials)
        costs.append(epsilon([*reserved, event], 1e-4))
    assert costs[0] < costs[1] < costs[2]


def test_a_crash_between_reserving_and_drawing_charges_nothing_twice(tmp_path: Path) -> None:
    """Half of a charge is on disk: the rest follows, and no trial has run."""
    plan, trials = make_plan(tmp_path), NoisyMeans(tmp_path)
    reserved, event = plan.events(trials)
    with open_search(tmp_path, trials) as search:
        search.ledger.spend(reserved[0], budget=plan.budget, purpose={"reserved": 0})
        search.run()
        assert search.ledger.events() == [*reserved, event]


def test_over_the_budget_nothing_is_charged_and_nothing_is_tried(tmp_path: Path) -> None:
    """A search whose trials each fit the budget, and which as a whole does not."""
    trials = NoisyMeans(tmp_path)
    make_plan(tmp_path, budget_epsilon=epsilon(trials.events({}), 1e-4) * 1.05, retries=0)
    with open_search(tmp_path, trials) as search:
        with pytest.raises(BudgetError, match="would bring the spend"):
            search.run()
        assert search.ledger.events() == [] and trials.asked == []


def test_what_is_published_does_not_tell_how_many_trials_there_were(tmp_path: Path) -> None:
    """The discount rests on a hidden K: the same best trial out of few and out of many is published in the same bytes."""
    published, numbers = set(), set()
    for seed in range(6):
        home = tmp_path / str(seed)
        make_plan(home, seed=f"{seed}", search="spring", candidates=(CANDIDATES[1],))
        trials = NoisyMeans(home, scores=[1.0] + [0.0] * 200)
        trials.kill = 1 if seed % 2 else None
        if seed % 2:
            with open_search(home, trials) as search, pytest.raises(Killed):
                search.run()
            trials.kill = None
        with open_search(home, trials) as search:
            folder = search.run()
            numbers.add(len(notes(search.ledger, "finished")))
        assert folder is not None and sorted(path.name for path in folder.iterdir()) == [
            "adapter.safetensors",
            "manifest.json",
        ]
        fields = json.loads((folder / "manifest.json").read_text())
        published.add(json.dumps({k: v for k, v in fields.items() if k not in ("files", "public_key", "signature")}))
    assert len(numbers) > 2, "the guard: numbers of trials differ"
    assert len(published) == 1


def test_settings_are_drawn_alike_and_with_replacement(tmp_path: Path) -> None:
    """A grid that is walked through in order has no discount: only blind draws make trials alike."""
    counts: Counter[int] = Counter()
    repeated = False
    for seed in range(30):
        make_plan(tmp_path / str(seed), mean_trials=30.0, shape=20.0, seed=f"{seed}", budget_epsilon=9.0)
        trials = NoisyMeans(tmp_path / str(seed))
        trials.kill = 1
        with open_search(tmp_path / str(seed), trials) as search, pytest.raises(Killed):
            search.run()
        with Ledger.open(tmp_path / str(seed) / LEDGER_FILE) as ledger:
            drawn = ledger.purposes()[-1]["drawn"]
        repeated |= any(a == b for a, b in pairwise(drawn))
        counts.update(drawn)
    total = sum(counts.values())
    assert total > 600 and repeated and set(counts) == {0, 1, 2}
    assert all(abs(count - total / 3) < 5 * (total * 2 / 9) ** 0.5 for count in counts.values())


def test_nothing_is_released_when_poisson_draws_no_trial(tmp_path: Path) -> None:
    """K = 0 is an outcome of the theorem: another draw in its place would be another distribution."""
    for seed in range(40):
        home = tmp_path / str(seed)
        make_plan(home, distribution="poisson", mean_trials=1.0, seed=f"{seed}")
        trials = NoisyMeans(home)
        with open_search(home, trials) as search:
            if (folder := search.run()) is None:
                assert trials.asked == [] and not (home / "selected").exists()
                assert any(isinstance(event, Selection) for event in search.ledger.events()), "charged all the same"
                return
            assert folder.exists()
    raise AssertionError("forty seeds without K = 0, whose probability is 0.37")


def test_an_adapter_that_changed_since_its_trial_is_not_sealed(tmp_path: Path) -> None:
    """Between the trials and the seal somebody may have put a better adapter in place, trained without noise."""
    make_plan(tmp_path)
    trials = NoisyMeans(tmp_path)
    with open_search(tmp_path, trials) as search:
        search.run()
        best = max(notes(search.ledger, "finished"), key=lambda note: note["score"])
    source = tmp_path / best["folder"]
    for folder in (tmp_path / "selected", source):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    seal_adapter(
        source, Adapter(TINY_SPEC, np.ones(TINY_SPEC.size, np.float32)), release_id="r", round=1, statement=None,
        key=SigningKey.generate(),
    )  # fmt: skip
    with open_search(tmp_path, trials) as search, pytest.raises(LedgerError, match="is not what trial"):
        search.run()


def test_a_seed_is_for_rehearsals_only(tmp_path: Path) -> None:
    """A number of trials that everybody can compute hides nothing."""
    with pytest.raises(ValueError, match="known seed"):
        make_plan(tmp_path, rehearsal=False)


def step(noise: float) -> SampledGaussian:
    sigma = int(noise * RESOLUTION)
    return SampledGaussian(noise_multiplier=noise, sampling_rate=0.2, sigma=sigma, dimension=9_216)


def test_planning_orders_the_ways_of_counting() -> None:
    """An operator who reads the cost of one trial plans a search that is refused, or worse, is not charged."""
    for kind in ("negative-binomial", "poisson"):
        found = search_cost([[step(4.0)] * 15, [step(5.0)] * 15], repetitions_of(kind, 10.0), 1e-5)
        assert found.one_trial < found.search < found.every_trial
        assert found.one_trial == epsilon([step(4.0)] * 15, 1e-5), "the dearest candidate"


PLANNED = {
    "devices": 500, "rounds": 15, "sampling_rate": 0.2, "evaluation_noise": 6.0, "delta": 1e-5, "trials": "5",
}  # fmt: skip


def planned(noise: float, retries: int) -> tuple[list[Event], Selection]:
    """What a search as planned charges, its first distribution of the number of trials."""
    common = {"clip_norm": 1.0, "devices": 500}
    one = Central(noise_multiplier=noise, sampling_rate=0.2, dimension=10_000, **common).event()  # type: ignore[arg-type]
    score = EvaluationOrder(
        federation="f", release="r", round=1, attempt=1, evaluation=1, noise_multiplier=6.0, sampling_rate=1.0,
        devices=500, bound=0.1, held_back=0.2,
    ).build_mechanism().event()  # fmt: skip
    return [one, score] * retries, selection_of([[*[one] * 15, score]], repetitions_of("negative-binomial", 5.0))


@pytest.mark.parametrize("retries", [0, 3])
def test_what_is_planned_is_what_is_charged_with_its_retries(retries: int) -> None:
    """Reserved retries that are charged and were not planned: the search is refused, or costs more than was announced."""
    page = plan_tuning(**PLANNED, noise_multiplier=2.0, retries=retries, target_epsilon=3.0)  # type: ignore[arg-type]
    reserved, search = planned(2.0, retries)
    row, calibrated = [line for line in page.splitlines() if line.startswith(search.repetitions.words)]
    assert row.removeprefix(search.repetitions.words).split()[1] == printed_epsilon(epsilon([*reserved, search], 1e-5))
    if retries:
        assert epsilon([*reserved, search], 1e-5) > epsilon([search], 1e-5) + 0.05, "the guard: retries are seen"
    noise = float(calibrated.split()[-1])
    below, above = planned(noise * 0.99, retries), planned(noise * 1.001, retries)  # it is printed rounded
    assert epsilon([*above[0], above[1]], 1e-5) <= 3.0 < epsilon([*below[0], below[1]], 1e-5)
    with pytest.raises(SettingsError, match="--retries -1"):
        plan_tuning(**PLANNED, noise_multiplier=2.0, retries=-1, target_epsilon=None)  # type: ignore[arg-type]


def test_calibration_meets_the_target_with_the_whole_search_and_says_why_it_cannot() -> None:
    """Noise that is calibrated for one trial passes the target as soon as anything is searched for."""
    drawn = repetitions_of("negative-binomial", 5.0)
    noise = calibrate_search(
        target_epsilon=2.0, delta=1e-5, repetitions=drawn, candidates=lambda noise: [[step(noise)] * 15],
        beside=lambda noise: [step(noise)],
    )  # fmt: skip

    def cost(noise: float) -> float:
        return epsilon([selection_of([[step(noise)] * 15], drawn), step(noise)], 1e-5)

    assert cost(noise) <= 2.0 < cost(noise * 0.99)
    with pytest.raises(BudgetError, match="even at noise multiplier 1,000 it costs"):
        calibrate_search(
            target_epsilon=0.5, delta=1e-5, repetitions=Poisson(mean=50.0),
            candidates=lambda noise: [[step(noise)] * 15, [step(2.0)]],
        )  # fmt: skip
