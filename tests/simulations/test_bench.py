"""The benchmark file: goals judged on the interval over queries and seeds, and missed ones left visible."""

from __future__ import annotations

import numpy as np
from tests.references.results import sample_results

from stillroom_simulations.bench import Scores, benchmark
from stillroom_simulations.results import Results


def scores(seed: int, *, gain: float) -> Scores:
    generator = np.random.default_rng(seed)
    teacher = np.random.default_rng(9).uniform(0.2, 1.0, 400)
    noise = generator.normal(0, 0.02, 400)
    student = teacher - 0.05 + noise
    return {
        "teacher": teacher,
        "student": student,
        "federated": student + gain,
        "federated_nonprivate": student + gain,
        "device": student + gain - 0.001,
        "central": student + 0.06,
    }


def test_goals_are_judged_on_the_lower_end() -> None:
    """A point estimate above the goal with an interval across it does not hold."""
    results = [Results.parse(sample_results())] * 3
    good = benchmark([scores(s, gain=0.058) for s in range(3)], results, [0, 1, 2])["figures"]
    poor = benchmark([scores(s, gain=0.01) for s in range(3)], results, [0, 1, 2])["figures"]
    assert good["federated_to_teacher"]["holds"]
    assert not poor["federated_to_teacher"]["holds"]
    assert good["nonprivate_share_of_central_gain"]["holds"]
    assert abs(good["nonprivate_share_of_central_gain"]["value"] - 0.058 / 0.06) < 1e-9
    assert not poor["nonprivate_share_of_central_gain"]["holds"]
    assert good["device_loss"]["holds"]
    for figure in good.values():
        assert figure["interval"][0] - 1e-9 <= figure["value"] <= figure["interval"][1] + 1e-9
