"""`stillroom audit canaries`: what it prints, and when it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import stillroom_server.coordinate
import stillroom_shared.mechanism
from stillroom_shared.cli import build_app
from stillroom_shared.randomness import Randomness
from stillroom_simulations.epsilon_context import check_epsilon_context

SMALL = ("--canaries", "500", "--rounds", "4", "--sampling-rate", "0.5", "--seed", "3", "--epsilon", "2")


def run(*options: str) -> Result:
    return CliRunner().invoke(build_app(), ["audit", "canaries", *SMALL, *options])


def test_a_sound_mechanism_passes_and_every_figure_is_called_what_it_is() -> None:
    """A lower bound that is printed as epsilon is read as a guarantee (DESIGN section 4, rule 8)."""
    done = run()
    assert done.exit_code == 0, done.output
    check_epsilon_context(done.stdout)
    assert re.search(r"^bound +\d+\.\d\d \(a lower bound, not epsilon; confidence 95%\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^estimate +\d+\.\d\d \(an estimate, not a bound\)$", done.stdout, re.MULTILINE)
    for line in done.stdout.splitlines():
        if line.startswith(("bound", "estimate", "audit")):
            assert not re.search(r"epsilon \d", line)
    assert "does not prove it" in done.stdout
    assert "calibrate" in done.stderr and "calibrate" not in done.stdout, "progress would break what reads the output"


def test_the_same_seed_gives_the_same_audit_and_json_holds_it() -> None:
    """A program that reads the wrong key, or an audit that nobody can repeat."""
    first, second = run("--json"), run("--json")
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert found["lower_bound"]["value"] <= found["statement"]["epsilon"]["PLD"] <= 2
    assert found["lower_bound"]["meaning"].startswith("a lower bound, not epsilon")
    assert found["estimate"]["meaning"].startswith("an estimate, not a bound")
    assert found["attacker"]["canaries"] == found["statement"]["devices"] == 500
    assert found["statement"]["rounds"] == 4 and found["broken"] is False
    assert json.loads(run("--json", "--seed", "4").stdout)["attacker"] != found["attacker"]


def test_no_mechanism_is_no_contradiction() -> None:
    """`none` promises nothing, so a bound beyond 3 breaks no promise."""
    done = run("--mechanism", "none", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert found["lower_bound"]["value"] > 3 and found["statement"]["epsilon"]["PLD"] is None
    assert found["estimate"]["value"] is None
    assert "No differential privacy" in run("--mechanism", "none").stdout


def test_a_broken_mechanism_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 0 beside a contradiction passes in every script."""
    monkeypatch.setattr(
        stillroom_shared.mechanism, "discrete_gaussian", lambda sigma, count, randomness: np.zeros(count, np.int64)
    )
    done = run()
    assert done.exit_code == 1
    assert "BROKEN" in done.stdout
    found = json.loads(run("--json").stdout)
    assert found["broken"] and found["lower_bound"]["value"] > found["statement"]["epsilon"]["PLD"]


def test_cohorts_that_are_no_poisson_samples_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is too coarse to see fixed-size sampling; the sizes are not."""

    def fixed(enrolled: Sequence[str], sampling_rate: float, randomness: Randomness) -> tuple[str, ...]:
        return tuple(sorted(enrolled, key=lambda name: randomness.bits(64))[: len(enrolled) // 2])

    monkeypatch.setattr(stillroom_server.coordinate, "poisson_cohort", fixed)
    done = CliRunner().invoke(build_app(), ["audit", "canaries", *SMALL, "--rounds", "8", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["cohort_size_p_value"] < 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mechanism", "nonsense"), "error: --mechanism is nonsense"),
        (("--canaries", "9"), "error: --canaries is 9"),
        (("--delta", "0.01"), "error: --delta is 0.01"),
        (("--sampling-rate", "1.5"), "error: --sampling-rate is 1.5"),
        (("--epsilon", "0.000001"), "error: epsilon 1e-06"),
    ],
)
def test_what_cannot_be_audited_is_refused(options: tuple[str, str], said: str) -> None:
    """A setting that is taken over in silence would be audited as something else."""
    done = run(*options)
    assert done.exit_code == 1 and done.stderr.replace("\n", " ").count(said) == 1, done.output
