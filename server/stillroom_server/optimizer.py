"""The server's optimizer: what it makes of a noisy mean update. Pure post-processing, so it costs no privacy.

Momentum gradient steps (FedAvgM, Hsu et al. 2019, arXiv 1909.06335) and the running average of the iterates, which
spreads the noise of single rounds (Polyak and Juditsky 1992).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """`momentum` in [0, 1); `averaging` is the share of past rounds, counted from the last, that the average covers (0: none).

    >>> optimizer = ServerOptimizer(learning_rate=1.0, momentum=0.5, averaging=1.0)
    >>> state = OptimizerState.start(np.zeros(1))
    >>> for _ in range(3):
    ...     state = optimizer.step(state, np.ones(1))
    >>> state.iterate.tolist(), optimizer.released(state).tolist()
    ([4.25], [2.5833333333333335])
    """

    learning_rate: float
    momentum: float
    averaging: float

    def step(self, state: OptimizerState, update: NDArray[np.float64]) -> OptimizerState:
        """Apply one released mean update, (size,)."""
        velocity = self.momentum * state.velocity + update
        iterate = state.iterate + self.learning_rate * velocity
        return replace(state, iterate=iterate, velocity=velocity, history=np.vstack([state.history, iterate]))

    def released(self, state: OptimizerState) -> NDArray[np.float64]:
        """The values to publish: the average over the last rounds, or the iterate itself."""
        return self.released_after(state, len(state.history))

    def released_after(self, state: OptimizerState, rounds: int) -> NDArray[np.float64]:
        """What `released` was after so many rounds; zero, where every federation starts, before the first."""
        if rounds == 0:
            return np.zeros_like(state.iterate)
        window = max(1, round(self.averaging * rounds))
        return np.asarray(state.history[rounds - window : rounds].mean(axis=0), np.float64)


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """`iterate` and `velocity` (size,), `history` (rounds, size): every iterate so far; all of it already released."""

    iterate: NDArray[np.float64]
    velocity: NDArray[np.float64]
    history: NDArray[np.float64]

    @classmethod
    def start(cls, values: NDArray[np.float64]) -> OptimizerState:
        """The state before the first round."""
        return cls(values, np.zeros_like(values), np.zeros((0, len(values))))
