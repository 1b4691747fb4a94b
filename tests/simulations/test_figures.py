"""No table of README or docs may say something else than the benchmark file that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom_simulations.epsilon_context import check_epsilon_context
from stillroom_simulations.figures import refresh

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_current(page: Path) -> None:
    """Figures that are typed by hand survive the code that made them."""
    text = page.read_text()
    assert refresh(text, ROOT) == text, "run `make docs`"


def test_a_stale_table_is_noticed_and_its_epsilon_has_its_context() -> None:
    """A marker that is misspelt would be left alone for ever."""
    text = "<!-- figures: benchmarks/results/demo.json -->\n0.1234 of last week\n<!-- end of figures -->\n"
    drawn = refresh(text, ROOT)
    assert "of last week" not in drawn
    assert "after private rounds" in drawn
    check_epsilon_context("".join(f"<p>{line}</p>" for line in drawn.splitlines() if "epsilon" in line))
