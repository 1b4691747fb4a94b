"""What `stillroom coordinate evaluate` prints: the difference, what it rests on, what it cost, and what followed."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from stillroom_server.adapters import ADAPTERS_FOLDER
from stillroom_server.verdict import Evaluation
from stillroom_shared.statement import READERS, printed_epsilon


def evaluation_table(found: Evaluation, home: Path) -> list[Table | str]:
    """A table and a sentence about what followed.

    >>> from stillroom_server.verdict import Policy
    >>> made = Evaluation(
    ...     number=1, round=15, attempt=2, baseline=0, difference=0.02, low=0.004, high=0.036, noise=0.005, second_moment=0.01,
    ...     answered=0.9, least_answered=0.8, bound=0.2, noise_multiplier=4.0, sampling_rate=1.0, devices=180, held_back=0.2,
    ...     policy=Policy(), verdict="publish", epsilon=1.5, delta=5e-4, rehearsal=False)
    >>> evaluation_table(made, Path("f"))[1]
    'publish: the whole interval is above -0.008. Round 15 is published: f/adapters/round-0015'
    """
    table = Table(title=f"Evaluation {found.number}", title_justify="left", box=None, show_header=False)
    against = f"the adapter of round {found.baseline}" if found.baseline else "the release without an adapter"
    cost = "no guarantee" if found.epsilon is None else f"epsilon {printed_epsilon(found.epsilon)}"
    rows = {
        "candidate": f"after {found.round} round{'s' * (found.round != 1)}, against {against}",
        "difference": f"{found.difference:+.4f} nDCG@10 (95% {found.low:+.4f} to {found.high:+.4f})",
        "mean of": (
            f"{found.devices:,} enrolled devices, each clipped to {found.bound:g}; one that scored nothing counts 0"
        ),
        "noise": f"standard deviation {found.noise:.4f} of the difference (noise multiplier {found.noise_multiplier:g})",
        "scored": f"{_share(found.answered)} of devices (at least {_share(found.least_answered)}, one-sided 99.5%)",
        "devices differ": _spread(found),
        "asked": f"{found.sampling_rate:.0%} of devices, on {found.held_back:.0%} of their queries",
        "spent so far": f"{cost} (user level, delta {found.delta:.1e}, against {READERS}); the coordinator: no guarantee",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if found.rehearsal:
        table.add_row("rehearsal", "the noise came from a known seed: nothing binds anybody who knows it")
    return [table, _verdict(found, home)]


def _share(value: float) -> str:
    return f"{min(max(value, 0.0), 1.0):.0%}"


def _spread(found: Evaluation) -> str:
    if found.second_moment <= 0:
        return "by less than the noise shows"
    return f"by about {math.sqrt(found.second_moment):.3f} (root mean square, from the same release)"


def _verdict(found: Evaluation, home: Path) -> str:
    threshold = f"{found.policy.threshold(found.least_answered):.3f}"
    if found.verdict == "publish":
        folder = home / ADAPTERS_FOLDER / f"round-{found.round:04d}"
        return f"publish: the whole interval is above {threshold}. Round {found.round} is published: {folder}"
    stands = f"the adapter of round {found.baseline}" if found.baseline else "the release without an adapter"
    return (
        f"roll back: the interval is not wholly above {threshold}. {stands[0].upper()}{stands[1:]} stands, the next round goes "
        f"on from it, and what was spent stays spent"
    )
