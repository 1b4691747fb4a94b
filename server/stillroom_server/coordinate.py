"""A federation's rounds: sample, charge, broadcast, sum, add noise, step. The heart of the operator's side.

`Coordinator.run` reads like the algorithm (DP-FedAvg with user-level central noise: McMahan et al. 2018, arXiv 1710.06963,
with a fixed denominator and Poisson cohorts; or a run of turns, charged at once: DP-FTRL, or updates that are private when they
leave the device). It resumes from its checkpoint; a round that was charged but not finished is tried again and charged again.

Guarantees:
    - The spend of a round is durable before any device is asked.
    - Whether and what a round releases does not depend on who answers: silence, an error, a malformed, oversized or
      non-finite update all count as the zero vector, and the denominator is fixed.
    - Each enrolled name takes part at most once in a round, whatever nodes claim that name.
    - An update counts only while the device's ledger did not go back in time, as its receipts show (`receipts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from stillroom_server.adapters import ADAPTERS_FOLDER, Adapters
from stillroom_server.charges import Formed, attempts_at, charge_run, is_whole_run, record_formed, require_covers
from stillroom_server.checkpoint import STATE_FILE, load_checkpoint, save_checkpoint
from stillroom_server.cohort import poisson_cohort
from stillroom_server.devices import enrolled_nodes, sum_updates, wait_for_nodes
from stillroom_server.plan import Plan
from stillroom_server.receipts import ReceiptBook
from stillroom_server.stream import RowStream
from stillroom_server.verdict import evaluations_in, last_rolled_back
from stillroom_shared.adapter import Adapter
from stillroom_shared.closing import Closing
from stillroom_shared.correlated import Correlated
from stillroom_shared.errors import BudgetError, LedgerError
from stillroom_shared.heads import LedgerHead, head_of
from stillroom_shared.ledger import Ledger
from stillroom_shared.local_rounds import LocalRounds
from stillroom_shared.mechanism import Mechanism, Released, Total
from stillroom_shared.protocol import (
    TRAIN,
    EvaluationOrder,
    RoundOrder,
    order_message,
)
from stillroom_shared.randomness import Randomness
from stillroom_shared.receipts import Attempt
from stillroom_shared.release import Release, open_release
from stillroom_shared.signing import SigningKey
from stillroom_shared.statement import PrivacyStatement

LEDGER_FILE = "ledger.sqlite3"
KEY_FILE = "coordinator.key"
_ROWS_FILE = "rows.npz"


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What the operator sees of a finished round; computed from public values and the released update only."""

    round: int
    rounds: int
    update_norm: float


class Coordinator(Closing):
    """One federation in one home folder: plan, key, ledger, checkpoint. Use as a context manager."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.plan = Plan.load(home)
        self.key = SigningKey.load_or_generate(home / KEY_FILE)
        self.release: Release = open_release(home / self.plan.release_folder, trusted_key=None)
        self.spec = self.release.adapter_spec
        self.adapters = Adapters(home / ADAPTERS_FOLDER, self.release, self.key)
        about = {"federation": self.plan.federation, "plan": self.plan.content_hash}
        self.ledger = Ledger.create(home / LEDGER_FILE, key=self.key, about=about)
        self.receipts = ReceiptBook(home, federation=self.plan.federation)
        try:
            self.state, self.unclipped = load_checkpoint(home / STATE_FILE, self.spec.size)
            require_covers(self.ledger, len(self.state.history), home / STATE_FILE)
            self.settle()
        except BaseException:
            self.ledger.close()
            raise

    @property
    def finished(self) -> bool:
        """Whether every planned round has been released."""
        return len(self.state.history) >= self.plan.rounds

    @property
    def adapter(self) -> Adapter:
        """The adapter to publish: the optimizer's average or last iterate."""
        return self.adapter_after(len(self.state.history))

    def adapter_after(self, rounds: int) -> Adapter:
        """What `adapter` was after so many rounds; all of it has been released already."""
        return Adapter(self.spec, self.plan.optimizer.released_after(self.state, rounds).astype(np.float32))

    def run(self, grid: Grid, on_round: Callable[[RoundReport], None] = lambda report: None) -> None:
        """Run the rounds that are left, then seal the adapter with its statement; where queries are held back, an evaluation
        has to let it pass first (`evaluation.py`).

        Stops early, without error, when a retried round used up the budget: what was released stays released.
        """
        self.settle()
        online: set[int] | None = None
        while not self.finished:
            if (now := wait_for_nodes(grid, self.plan)) != online:
                online, nodes = now, enrolled_nodes(grid, self.plan)
            try:
                norm = self._round(grid, nodes)
            except BudgetError as error:
                self.ledger.record({"stopped": str(error)})
                break
            on_round(RoundReport(round=len(self.state.history), rounds=self.plan.rounds, update_norm=norm))
        if not self.plan.held_back:
            self.publish()

    @property
    def published(self) -> Path:
        """Where the adapter after the rounds so far is, or will be, sealed."""
        return self.adapters.after(len(self.state.history))

    def publish(self) -> None:
        """Seal the released adapter beside the statement that covers every charge so far; once for each round."""
        if self.published.exists():
            return
        self.adapters.seal(len(self.state.history), self.adapter, self.statement(), self.ledger_head().position)

    def statement(self) -> PrivacyStatement:
        """What has been spent, from the ledger."""
        return self.plan.statement(self.ledger.rows())

    def baseline(self) -> tuple[int, Adapter]:
        """What was published last, and after how many rounds; zero after none."""
        return self.adapters.latest(len(self.state.history))

    def settle(self) -> None:
        """Do what the last evaluation decided, if that was not done before a crash.

        Raises `LedgerError` when the checkpoint, or a result beside the adapters, is not what the ledger says.
        """
        if decided := evaluations_in(self.ledger.rows()):
            last = decided[-1]
            self.adapters.keep(last)
            if last.round == len(self.state.history) and last.verdict == "publish":
                self.publish()
            elif last.round == len(self.state.history) and self.state.restart < last.round:
                _, baseline = self.baseline()
                self.state = self.state.rolled_back(baseline.values.astype(np.float64))
                save_checkpoint(self.home / STATE_FILE, self.state, self.unclipped)
        due, results = last_rolled_back(decided), self.adapters.evaluations
        if (self.state.restart, results) != (due, len(decided)):
            raise LedgerError(
                f"{self.home} was rolled back at round {self.state.restart} and holds {results} evaluations, its ledger "
                f"says {due} and {len(decided)}: one of them is an old copy; restore the newest of both"
            )

    def asked(self, round_number: int) -> int:
        """Attempts at a round, and at evaluations after it: devices number both in one row."""
        return attempts_at(self.ledger, round_number)

    def _round(self, grid: Grid, nodes: Mapping[str, int]) -> float:
        """One attempt at the next round; returns the norm of the released update."""
        order = self._next_order()
        mechanism = order.build_mechanism()
        self._require_an_evaluation_after(mechanism)
        if isinstance(mechanism, Correlated):
            released = self._row(grid, nodes, order, mechanism)
        elif isinstance(mechanism, LocalRounds):
            charge_run(self.ledger, mechanism, self.plan.budget)
            total = self._ask_turn(grid, nodes, order)
            record_formed(self.ledger, Formed.of(order.round, total))
            released = mechanism.release(total, self.randomness("none", order))  # the noise is in the updates
        else:
            charged = {"round": order.round, "attempt": order.attempt}
            self.ledger.spend(mechanism.event(), budget=self.plan.budget, purpose=charged)
            cohort = poisson_cohort(self.plan.enrolled, self.plan.sampling_rate, self.randomness("cohort", order))
            total = self._ask(grid, nodes, cohort, order)
            released = mechanism.release(total, self.randomness("noise", order))
        self.state = self.plan.optimizer.step(self.state, released.update)
        if released.unclipped is not None:
            self.unclipped += (released.unclipped,)
        save_checkpoint(self.home / STATE_FILE, self.state, self.unclipped)
        return float(np.linalg.norm(released.update))

    def _row(self, grid: Grid, nodes: Mapping[str, int], order: RoundOrder, mechanism: Correlated) -> Released:
        """One attempt at the next row of a correlated run."""
        charge_run(self.ledger, mechanism, self.plan.budget)
        about = {"federation": self.plan.federation, "plan": self.plan.content_hash}
        with RowStream(self.home / _ROWS_FILE, mechanism, ledger=self.ledger, **about) as rows:
            update = rows.pending(order.round - 1)
            if update is None:  # no row was formed that the checkpoint lacks
                total = self._ask_turn(grid, nodes, order)
                update = rows.release(order.round, total, self.randomness("noise", order))
        return Released(update)

    def _ask_turn(self, grid: Grid, nodes: Mapping[str, int], order: RoundOrder) -> Total:
        """Ask the devices whose turn it is, after a note: the next attempt must carry another number."""
        self.ledger.record({"asked": {"round": order.round, "attempt": order.attempt}})
        return self._ask(grid, nodes, self.plan.rotation.cohort(order.round), order)

    def _ask(self, grid: Grid, nodes: Mapping[str, int], cohort: Sequence[str], order: RoundOrder) -> Total:
        """Have the cohort train from the present iterate."""
        order = order.model_copy(update={"ledger": self.ledger_head()})
        content = order_message(order, Adapter(self.spec, self.state.iterate.astype(np.float32)))
        return self.collect(grid, nodes, cohort, TRAIN, content, order)

    def collect(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        cohort: Sequence[str],
        kind: str,
        content: RecordDict,
        order: RoundOrder | EvaluationOrder,
    ) -> Total:
        """Broadcast to the cohort's devices that are online, and add up what they answer."""
        messages = [
            Message(content, dst_node_id=nodes[name], message_type=kind, group_id=str(order.round))
            for name in cohort
            if name in nodes
        ]
        mechanism = order.build_mechanism()
        asked, names = Attempt(order.round, order.attempt), {node: name for name, node in nodes.items()}
        with self.receipts.round({asked: mechanism.participation_event()}) as admits:
            return sum_updates(
                grid.send_and_receive(messages, timeout=self.plan.reply_timeout_seconds),
                mechanism,
                lambda node, receipt: admits(names[node], receipt),
            )

    def ledger_head(self) -> LedgerHead:
        """What devices are shown of the ledger, with the spend of this attempt in it."""
        return head_of([row.hash for row in self.ledger.rows()])

    def _require_an_evaluation_after(self, mechanism: Mechanism) -> None:
        """Refuse a round after which the budget would not pay for the evaluation that it needs to be published."""
        if self.plan.held_back and self.plan.budget and not is_whole_run(self.ledger):
            after = self.plan.evaluation(number=1, round_number=1, attempt=1, release=self.release.id)
            try:
                self.plan.budget.check([*self.ledger.events(), mechanism.event(), after.build_mechanism().event()])
            except BudgetError as error:
                raise BudgetError(f"no budget would be left for the evaluation of what comes next: {error}") from error

    def _next_order(self) -> RoundOrder:
        number = len(self.state.history) + 1
        return self.plan.order(
            round_number=number,
            attempt=1 + self.asked(number),
            release=self.release.id,
            dimension=self.spec.size,
            unclipped=self.unclipped,
        )

    def randomness(self, use: str, order: RoundOrder | EvaluationOrder) -> Randomness:
        """Fresh randomness for one use in one attempt; in a rehearsal with a seed, always the same."""
        if self.plan.seed is None:
            return Randomness()
        return Randomness(seed=f"{self.plan.seed}/{use}/{order.round}/{order.attempt}")

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()
