"""The server's optimizer: what it makes of a noisy mean update. Pure post-processing, so it costs no privacy.

| name | step |
|---|---|
| `momentum` | `v = momentum * v + update`, `x += rate * v` (FedAvgM, Hsu et al. 2019, arXiv 1909.06335) |
| `adam` | `x += rate * v / (sqrt(s) + floor)`, moving averages of update and square (FedAdam, arXiv 2003.00295) |

What is published may be the running average of the iterates, which spreads the noise of single rounds (Polyak and Juditsky
1992).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

OptimizerName = Literal["momentum", "adam"]


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """How iterates move.

    Attributes:
        learning_rate: of the server; under `adam` about the change of each value in a round.
        momentum: in [0, 1).
        averaging: the share of past rounds, counted from the last, that the average covers; 0: none.
        square_momentum, floor: of `adam`; the floor keeps values that hardly ever get a gradient from jumping.

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
    name: OptimizerName = "momentum"
    square_momentum: float = 0.99
    floor: float = 1e-5

    def step(self, state: OptimizerState, update: NDArray[np.float64]) -> OptimizerState:
        """Apply one released mean update, (size,)."""
        square = state.square
        if self.name == "momentum":
            velocity = self.momentum * state.velocity + update
            direction = velocity
        else:
            velocity = self.momentum * state.velocity + (1 - self.momentum) * update
            square = self.square_momentum * square + (1 - self.square_momentum) * update**2
            # Both averages start at zero; what they lack after so many rounds is known (Kingma and Ba 2015, section 3).
            rounds = len(state.history) + 1 - state.restart
            first, second = velocity / (1 - self.momentum**rounds), square / (1 - self.square_momentum**rounds)
            direction = first / (np.sqrt(second) + self.floor)
        iterate = state.iterate + self.learning_rate * direction
        history = np.vstack([state.history, iterate])
        return replace(state, iterate=iterate, velocity=velocity, square=square, history=history)

    def released(self, state: OptimizerState) -> NDArray[np.float64]:
        """The values to publish: the average over the last rounds, or the iterate itself."""
        return self.released_after(state, len(state.history))

    def released_after(self, state: OptimizerState, rounds: int) -> NDArray[np.float64]:
        """What `released` was after so many rounds; zero, where every federation starts, before the first."""
        if rounds == 0:
            return np.zeros_like(state.iterate)
        window = max(1, round(self.averaging * (rounds - state.restart)))
        return np.asarray(state.history[rounds - window : rounds].mean(axis=0), np.float64)


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """Where the rounds stand; all of it has been released already.

    Attributes:
        iterate, velocity, square: (size,).
        history: (rounds, size), what stood after each round.
        restart: rounds that were rolled back, with all before them: neither averages nor moments reach behind them.
    """

    iterate: NDArray[np.float64]
    velocity: NDArray[np.float64]
    square: NDArray[np.float64]
    history: NDArray[np.float64]
    restart: int = 0

    @classmethod
    def start(cls, values: NDArray[np.float64]) -> OptimizerState:
        """The state before the first round."""
        return cls(values, np.zeros_like(values), np.zeros_like(values), np.zeros((0, len(values))))

    def rolled_back(self, values: NDArray[np.float64]) -> OptimizerState:
        """Go on from `values`, (size,). Rounds so far stay counted, as if each had ended there.

        >>> optimizer = ServerOptimizer(learning_rate=1.0, momentum=0.9, averaging=1.0)
        >>> state = optimizer.step(OptimizerState.start(np.zeros(1)), np.array([8.0])).rolled_back(np.array([2.0]))
        >>> optimizer.released(state).tolist(), optimizer.released(optimizer.step(state, np.ones(1))).tolist()
        ([2.0], [3.0])
        """
        rounds = len(self.history)
        return replace(OptimizerState.start(values), history=np.tile(values, (rounds, 1)), restart=rounds)
