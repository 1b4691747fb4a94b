"""One evaluation: charge, ask, sum, add noise, decide. `Coordinator.run` in small, with two adapters in place of one.

Devices score the candidate against what is published, on queries that they held back from training; their clipped
differences go through `Central`, the same messages, the same ledger and the same budget as a round
(`stillroom_shared.comparison` has the mathematics, `verdict.py` what follows).

Guarantees:
    - The spend is durable before any device is asked, and a budget that it would pass refuses it before.
    - Whether and what is released does not depend on who answers, as in a round.
    - Killed at any point, the federation is as before (and the retry is charged again) or as the verdict wants it: the
      note in the ledger decides, and `Coordinator` does what the last note says when it opens.

| case | result |
|---|---|
| no query is held back | `SettingsError` naming the setting, nothing is spent |
| no round since the last published or rolled-back one | `SettingsError`, nothing is spent |
| nobody online | waited for, then `ProtocolError`, nothing is spent |
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from stillroom_server.app import coordinator_home
from stillroom_server.cohort import poisson_cohort
from stillroom_server.coordinate import Coordinator
from stillroom_server.devices import enrolled_nodes, wait_for_nodes
from stillroom_server.verdict import NOTE, Evaluation, Policy, evaluations_in
from stillroom_shared.errors import SettingsError
from stillroom_shared.protocol import EVALUATE, EvaluationOrder, evaluation_message


def evaluate(coordinator: Coordinator, grid: Grid, policy: Policy) -> Evaluation:
    """Compare the candidate with what is published, and publish it or roll back."""
    order = next_evaluation(coordinator)
    wait_for_nodes(grid, coordinator.plan)
    nodes = enrolled_nodes(grid, coordinator.plan)
    comparison, mechanism = order.comparison, order.build_mechanism()
    baseline_round, baseline = coordinator.baseline()
    charged = {"evaluation": order.evaluation, "attempt": order.attempt, "after": order.round}
    coordinator.ledger.spend(mechanism.event(), budget=coordinator.plan.budget, purpose=charged)
    enrolled, rate = coordinator.plan.enrolled, coordinator.plan.evaluation_rate
    cohort = poisson_cohort(enrolled, rate, coordinator.randomness("evaluation cohort", order))
    order = order.model_copy(update={"ledger": coordinator.ledger_head()})
    content = evaluation_message(order, baseline, coordinator.adapter)
    total = coordinator.collect(grid, nodes, cohort, EVALUATE, content, order)
    released = mechanism.release(total, coordinator.randomness("evaluation noise", order))
    found = comparison.estimate(released.update)
    made = coordinator.statement()
    evaluation = Evaluation(
        number=order.evaluation,
        round=order.round,
        attempt=order.attempt,
        baseline=baseline_round,
        **vars(found),
        **order.model_dump(include={"bound", "noise_multiplier", "sampling_rate", "devices", "held_back"}),
        policy=policy,
        verdict=policy.verdict(found),
        epsilon=made.epsilon["PLD"],
        delta=made.delta,
        rehearsal=made.rehearsal,
    )
    coordinator.ledger.record({NOTE: evaluation.model_dump(mode="json")})
    coordinator.settle()
    return evaluation


def next_evaluation(coordinator: Coordinator) -> EvaluationOrder:
    """The order of the next attempt; `SettingsError` when there is nothing to evaluate, or nothing to judge it by."""
    rounds = len(coordinator.state.history)
    number = 1 + len(evaluations_in(coordinator.ledger.rows()))
    attempt = 1 + coordinator.asked(rounds)
    order = coordinator.plan.evaluation(
        number=number, round_number=max(rounds, 1), attempt=attempt, release=coordinator.release.id
    )
    if rounds == coordinator.state.restart:
        raise SettingsError(
            f"round {rounds} was rolled back: run further rounds, then evaluate"
            if rounds
            else "no round has been released yet, so there is no candidate: run rounds, then evaluate"
        )
    if coordinator.published.exists():
        raise SettingsError(f"{coordinator.published} is published already: run further rounds, then evaluate")
    return order


def evaluation_app(policy: Policy, on_result: Callable[[Evaluation], None] = lambda found: None) -> ServerApp:
    """A server app that runs one evaluation in the home that the run configuration names, on any of Flower's engines."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with Coordinator(coordinator_home(context)) as coordinator:
            on_result(evaluate(coordinator, grid, policy))

    return app
