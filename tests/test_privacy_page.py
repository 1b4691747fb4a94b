"""docs/privacy.md names the tests that guard its claims: each must exist, or the claim is guarded by nothing."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_guard_that_the_page_names_exists() -> None:
    """A test that was renamed or removed leaves a claim that nobody checks."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "privacy.md").read_text()))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30, "the page is read wrongly"
    assert not named - defined
