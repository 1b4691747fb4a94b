"""What the owners of simulated devices agree to: whatever mechanism a plan names, and under `local` its cost as the limit.

A simulation runs one federation after another over the same homes, each standing for one of its own. A limit counts all that
a device's ledger holds, the non-private baseline too. So before a run under `local` what other federations spent is set aside,
beside the ledger; a device that is deployed never does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from stillroom_client.participation import KEY_FILE, LEDGER_FILE, Consent
from stillroom_server.plan import Plan
from stillroom_shared.accounting import epsilon
from stillroom_shared.errors import BudgetError
from stillroom_shared.ledger import Ledger
from stillroom_shared.local_rounds import LocalRounds

CONSENT = Consent(mechanisms=("central", "correlated", "local", "none"), minimum_noise_multiplier=0.25)
"""Without a limit: with less noise than that nothing is certified anyway."""


def agree(homes: Sequence[Path], plan: Plan, dimension: int) -> Consent:
    """Save the consent of every owner to a plan, and return it.

    Raises:
        BudgetError: a run under `local` whose cost nothing bounds, so that no owner could set a limit.
    """
    consent = CONSENT
    if plan.mechanism == "local" and plan.rounds:
        order = plan.order(round_number=1, attempt=1, release="any", dimension=dimension)
        mechanism = order.build_mechanism()
        assert isinstance(mechanism, LocalRounds)
        cost = epsilon([mechanism.event()], plan.delta)
        if not math.isfinite(cost):
            raise BudgetError(
                f"noise multiplier {plan.noise_multiplier} promises a query nothing, so no owner would agree: choose more noise"
            )
        limits = {"limit_epsilon": math.ceil(cost * 100) / 100, "limit_delta": plan.delta}
        consent = CONSENT.model_copy(update=limits)
        for home in homes:
            _set_aside(home, plan.federation)
    for home in homes:
        consent.save(home)
    return consent


def _set_aside(home: Path, federation: str) -> None:
    if not (home / LEDGER_FILE).exists():
        return
    with Ledger.open(home / LEDGER_FILE) as ledger:
        others = {purpose["federation"] for purpose in ledger.purposes()} - {federation}
        head = ledger.head[:8]
    if others:
        for path in (home / KEY_FILE, home / LEDGER_FILE):  # the ledger last: while it is here, this is not done
            if path.exists():
                path.rename(path.with_name(f"{path.name}.before-{head}"))
