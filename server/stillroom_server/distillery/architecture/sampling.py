"""Which shape is tried next: the tree-structured Parzen estimator of Optuna (Bergstra et al. 2011; multivariate as in Falkner
et al. 2018, arXiv 1807.01774), over shapes that can be and were not tried yet.

An axis is sampled by the position among its choices, so that neighbouring sizes count as alike. The first trial is the
smallest shape, then `random` ones come. Trials out of bounds are worse than all others, the less the closer they came.

Guarantees: what is drawn is a function of the settings' seed and of the trials that are finished, nothing else. So a search
that was interrupted or killed draws what it would have drawn, and the interrupted shape again. That is as far as it goes:
quality and latency that come out otherwise on another machine, or with other versions, lead elsewhere.

| case | what happens |
|---|---|
| the estimator draws a shape that was tried or cannot be | drawn again, `_DRAWS` times, then one of the rest at random |
| a single choice on an axis | not sampled |
| nothing is left | `count` says so before it is asked |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from stillroom_server.distillery.architecture.settings import AXES, ArchitectureSettings, Shape

Places = tuple[int, ...]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_DRAWS = 16


class UntriedShapes(BaseSampler):
    """Draws shapes that were not tried."""

    def __init__(self, settings: ArchitectureSettings) -> None:
        self._seed, self._random = settings.seed, settings.random
        self._choices = settings.choices
        self._possible = {self._places(shape): None for shape in settings.all_shapes()}  # a set that keeps its order

    @property
    def space(self) -> dict[str, IntDistribution]:
        """The position on each axis."""
        return {axis: IntDistribution(0, len(values) - 1) for axis, values in self._choices.items()}

    @property
    def count(self) -> int:
        """Shapes that can be."""
        return len(self._possible)

    def left(self, tried: Collection[Places]) -> list[Places]:
        """What was not tried, the smallest shape first."""
        return [places for places in self._possible if places not in tried]

    def shape(self, places: Mapping[str, int]) -> Shape:
        """The shape at these positions."""
        return {axis: self._choices[axis][places[axis]] for axis in AXES}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes are drawn together."""
        return dict(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Positions of the next shape."""
        finished = study.get_trials(deepcopy=False, states=FINISHED)
        tried = {tuple(one.params[axis] for axis in AXES) for one in finished}
        left = self.left(tried)
        generator = np.random.default_rng([self._seed, len(finished)])
        if not finished:
            return dict(zip(AXES, left[0], strict=True))
        if len(finished) >= self._random:
            estimator = TPESampler(n_startup_trials=0, seed=int(generator.integers(1 << 31)), constant_liar=False)
            varied = {axis: one for axis, one in search_space.items() if not one.single()}
            untried = set(left)
            for _ in range(_DRAWS if varied else 0):
                drawn = dict.fromkeys(AXES, 0) | estimator.sample_relative(study, trial, varied)
                if tuple(drawn.values()) in untried:
                    return drawn
        return dict(zip(AXES, left[int(generator.integers(len(left)))], strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: all axes are drawn together."""
        raise NotImplementedError(f"{param_name} is drawn with the other axes")

    def _places(self, shape: Shape) -> Places:
        return tuple(self._choices[axis].index(shape[axis]) for axis in AXES)
