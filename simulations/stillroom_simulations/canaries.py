"""Canaries in real rounds: devices where the unit is a user, queries where it is a query; the rounds are the coordinator's own.

Everything between an update and a release is what a deployment runs: plan, ledger, Poisson cohort, wire format, bounding,
admission, integer sum, noise, denominator, server step. Only the training is replaced: a canary device answers with
a direction of its own, ten times as long as the clip norm, or with zero where it is absent, which is the most that one
device can do to a sum. No tower runs, so the release that the rounds belong to holds none; a device's own ledger is
written by `stillroom_client`, stands after the order is read and before the update leaves, and is not audited here.

All enrolled devices are canaries. Data of others would only add to the noise that the attacker sees. Under `local` there is one
device, whose queries are the canaries: coins, clipping, sums, noise and steps are those of `descend`, which every device runs,
and the gradient of a canary is its direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from stillroom_server.app import HOME_KEY, server_app
from stillroom_server.coordinate import KEY_FILE, Coordinator, RoundReport
from stillroom_server.plan import Plan
from stillroom_shared.adapter import AdapterSpec
from stillroom_shared.errors import StillroomError
from stillroom_shared.local_mechanism import descend
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import MechanismName, Update
from stillroom_shared.protocol import RoundOrder, Schedule, enrolment_message, read_order, update_message
from stillroom_shared.randomness import Randomness
from stillroom_shared.release import DOCUMENT_FOLDER, ONNX_FILES, TOKENIZER_NAME, Release, open_release, seal_release
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement
from stillroom_shared.toeplitz import best_coefficients
from stillroom_simulations.engine import InProcessGrid, numbered, run_server_app

_NAME = "canary"
_OVERLENGTH = 10.0
"""Canaries send this many clip norms: a mechanism that forgot to clip would be audited with updates ten times too long."""
_PLAIN_CLIP_NORM = 1.0
LOCAL_STEPS = 2
"""Noisy steps of a round under `local`."""


@dataclass(frozen=True)
class CanaryRounds:
    """What a federation of canaries left behind.

    Attributes:
        released: the released mean updates, (rounds, dimension), as a reader of releases gets them from the iterates.
        cohort_sizes: how many devices were asked in each round; no reader of releases sees these.
        statement: what the coordinator's ledger says the rounds cost.
    """

    released: NDArray[np.float64]
    cohort_sizes: tuple[int, ...]
    statement: PrivacyStatement


def canary_directions(canaries: int, randomness: Randomness) -> NDArray[np.float64]:
    """Orthonormal directions in a space of twice as many dimensions, (canaries, 2 * canaries), uniform over all rotations.

    Orthogonal, so that canaries do not disturb each other: interference is what makes audits in one run loose (arXiv
    2503.07199). Dense and random, so that a coordinate without noise, or noise shared by coordinates, is noticed.

    >>> directions = canary_directions(3, Randomness(seed="toy"))
    >>> np.allclose(directions @ directions.T, np.eye(3)), directions.shape
    (True, (3, 6))
    """
    gaussian = np.random.default_rng(randomness.bits(128)).normal(size=(2 * canaries, canaries))
    frame, triangle = np.linalg.qr(gaussian)
    # The signs of the triangle's diagonal depend on the algorithm; without this the frame would not be uniform.
    return np.asarray((frame * np.sign(np.diag(triangle))).T, np.float64)


def canary_release(folder: Path, canaries: int) -> Release:
    """A sealed release without towers, whose adapters have twice as many values as there are canaries."""
    for tower in (folder, folder / DOCUMENT_FOLDER):
        for name in (*ONNX_FILES.values(), TOKENIZER_NAME):
            (tower / name).parent.mkdir(parents=True, exist_ok=True)
            (tower / name).write_text("canaries need no tower\n")
    spec = AdapterSpec(rank=2, layers=(0,), targets=("value",), dim=canaries, seed=0)
    key = SigningKey.generate()
    fields = {
        "dimension": 1,
        "query_tokens": 3,
        "document_tokens": 3,
        "parent": None,
        "adapter_round": 0,
        "adapter_spec": spec,
        "privacy_statement": None,
    }
    seal_release(folder, fields, key)
    return open_release(folder, trusted_key=key.public)


def canary_plan(
    release: Release,
    *,
    canaries: int,
    mechanism: MechanismName,
    noise_multiplier: float | None,
    budget_epsilon: float | None,
    delta: float,
    rounds: int,
    sampling_rate: float,
    seed: str | None,
) -> Plan:
    """The plan of a federation of canaries. Iterates are sums of releases: no momentum, no average, server step 1.

    `sampling_rate`: chance of a canary to be in a round; under `correlated` one divided by the separation of its turns, under
    `local` the chance of a query to be in a step.
    """
    private, local = mechanism != "none", mechanism == "local"
    schedule = canary_schedule(mechanism, rounds, sampling_rate)
    coefficients = None
    if schedule is not None and not local:
        bands = min(schedule.separation, rounds)
        coefficients = best_coefficients(bands, rounds, schedule.participations, schedule.separation)
    return Plan(
        federation="canaries",
        release_folder=release.folder,
        enrolled=("silo",) if local else tuple(f"canary-{number}" for number in range(canaries)),
        mechanism=mechanism,
        rounds=rounds,
        schedule=schedule,
        coefficients=coefficients,
        records=canaries if local else None,
        record_rate=sampling_rate if local else None,
        sampling_rate=sampling_rate if schedule is None else 1 / schedule.separation,
        clip_norm=_PLAIN_CLIP_NORM if private else None,
        noise_multiplier=noise_multiplier if private else None,
        budget_epsilon=budget_epsilon if private else None,
        delta=delta,
        local_steps=LOCAL_STEPS if local else 1,
        local_learning_rate=1.0,
        temperature=1.0,
        candidates=2,
        server_learning_rate=1.0,
        momentum=0.0,
        averaging=0.0,
        rehearsal=seed is not None,
        seed=seed,
    )


def canary_schedule(mechanism: MechanismName, rounds: int, sampling_rate: float) -> Schedule | None:
    """When canaries take turns; None where they are sampled."""
    if mechanism not in ("correlated", "local"):
        return None
    return Schedule.every(1 if mechanism == "local" else round(1 / sampling_rate), rounds=rounds)


def canary_weights(plan: Plan) -> NDArray[np.float64] | None:
    """The matched filter of an attacker who knows the plan, (canaries, rounds); None where a plain sum is as good.

    Under `correlated` the releases are G + C^-1 Z, with C the strategy matrix and Z fresh noise. Multiplied by C they are
    C G + Z, where a canary that took part in the rounds s shows as C s: weights C^T C s give the inner product with that.
    """
    if plan.mechanism != "correlated":
        return None
    strategy = sum(c * np.eye(plan.rounds, k=-j) for j, c in enumerate(plan.coefficients or ()))
    cohorts = [set(plan.rotation.cohort(number)) for number in range(1, plan.rounds + 1)]
    turns = np.array([[name in cohort for cohort in cohorts] for name in plan.enrolled], np.float64)
    return np.asarray(turns @ (np.transpose(strategy) @ strategy), np.float64)


def run_canary_rounds(
    home: Path,
    plan: Plan,
    directions: NDArray[np.float64],
    present: NDArray[np.bool_],
    *,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> CanaryRounds:
    """Run all rounds of the plan in a new `home`; the canary `i` answers along `directions[i]` where `present[i]`."""
    plan.save(home)
    SigningKey.generate().save(home / KEY_FILE)
    asked: Counter[int] = Counter()
    grid = InProcessGrid(
        client_app=_canary_app(plan, directions, present, asked),
        nodes=numbered({_NAME: i} for i in range(len(plan.enrolled))),
        run_config={HOME_KEY: str(home)},
    )
    run_server_app(server_app(on_round), grid)
    with Coordinator(home) as coordinator:
        iterates, statement = coordinator.state.history, coordinator.statement()
    if grid.failures or len(iterates) != plan.rounds:
        raise StillroomError(
            f"{grid.failures} canaries failed and {len(iterates)} of {plan.rounds} rounds were released in {home}: the audit "
            "would look better than it is; see the log above"
        )
    released = np.diff(iterates, axis=0, prepend=np.zeros((1, iterates.shape[1])))
    return CanaryRounds(released, tuple(asked[number] for number in range(1, plan.rounds + 1)), statement)


def _canary_app(
    plan: Plan, directions: NDArray[np.float64], present: NDArray[np.bool_], asked: Counter[int]
) -> ClientApp:
    """What a canary device runs; `asked` counts the devices of each round."""
    app = ClientApp()

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        return Message(enrolment_message(plan.enrolled[_number(context)]), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, adapter = read_order(message.content)
        asked[order.round] += 1
        mechanism = order.build_mechanism()
        if isinstance(mechanism, LocalRounds):
            made = _private_update(plan, order, mechanism, adapter.values, directions, present)
            return Message(update_message(made), reply_to=message)
        number = _number(context)
        length = _OVERLENGTH * (order.clip_norm or _PLAIN_CLIP_NORM) if present[number] else 0.0
        raw = (length * directions[number]).astype(np.float32)
        return Message(update_message(mechanism.bound(raw)), reply_to=message)

    return app


def _private_update(
    plan: Plan,
    order: RoundOrder,
    mechanism: LocalRounds,
    values: NDArray[np.float32],
    directions: NDArray[np.float64],
    present: NDArray[np.bool_],
) -> Update:
    """The update of the one device whose queries are the canaries; an absent one keeps its place and adds nothing."""

    def gradients(
        iterates: NDArray[np.float32], chosen: Sequence[Sequence[int]]
    ) -> list[tuple[int, NDArray[np.float32]]]:
        length = -_OVERLENGTH * mechanism.training.clip_norm  # descending along it goes along the direction
        return [(0, (length * directions[i]).astype(np.float32)) for i in chosen[0] if present[i]]

    seed = None if plan.seed is None else f"{plan.seed}/silo/{order.round}/{order.attempt}"
    change = descend(
        mechanism.training,
        values,
        [range(len(directions))],
        gradients,
        learning_rate=order.learning_rate,
        randomness=[Randomness(seed=seed)],
    )
    return mechanism.bound(change[0])


def _number(context: Context) -> int:
    return int(str(context.node_config[_NAME]))
