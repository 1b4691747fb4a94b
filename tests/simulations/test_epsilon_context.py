"""The rule that no epsilon is printed without unit, delta and adversary, on pages made to break it."""

from __future__ import annotations

import pytest

from stillroom_simulations.epsilon_context import EpsilonContextError, check_epsilon_context

CONTEXT = "user level, delta 1e-5, against readers of releases"
COORDINATOR = "<p>Against the coordinator: none.</p>"


@pytest.mark.parametrize(
    ("html", "lacking"),
    [
        ("<p>epsilon 3.9</p>", "unit, delta, adversary"),
        ("<p>\u03b5 = 3.9 (delta 1e-5, against readers of releases)</p>", "unit"),
        ("<p>&epsilon; 3.9 (user level, against readers of releases)</p>", "delta"),
        ("<p>Epsilon 3.9 (user level, delta 1e-5)</p>", "adversary"),
        (f"<p>Epsilon 3.9 (user level, delta 1e-5, against the coordinator)</p><p>{CONTEXT}</p>", "adversary"),
        ("<div>epsilon <b>3.9</b></div>", "unit, delta, adversary"),
        (f"<p>epsilon <b>3.9</b></p><p>{CONTEXT}</p>", "unit, delta, adversary"),
        (f"<p>epsilon 3.9</p><section><p>{CONTEXT}</p></section>", "unit, delta, adversary"),
        (f"<section><h2>Epsilon</h2><p>3.9</p></section><p>{CONTEXT}</p>", "unit, delta, adversary"),
        (f"<section><h2>Epsilon 3.9</h2><p>{CONTEXT}</p></section>", "unit, delta, adversary"),
        ("<ul><li>epsilon is infinity</li></ul>", "unit, delta, adversary"),
        ("<table><tr><th>epsilon</th></tr><tr><td>3.9</td></tr></table>", "unit, delta, adversary"),
        ('<img alt="epsilon 3.9 after ten rounds">', "unit, delta, adversary"),
        ('<svg aria-label="epsilon 3.9"><path d="M0 0"/></svg>', "unit, delta, adversary"),
        ("<svg><text>\u03f5</text><text>3.9</text></svg>", "unit, delta, adversary"),
        ("<html><head><title>epsilon 3.9</title></head></html>", "unit, delta, adversary"),
        (f"<dl><dt>epsilon</dt><dd>3.9</dd></dl><p>{CONTEXT}</p>", "unit, delta, adversary"),
    ],
)
def test_epsilon_out_of_context_is_refused(html: str, lacking: str) -> None:
    """An epsilon alone is read as a guarantee for everything, against everybody."""
    with pytest.raises(EpsilonContextError) as refused:
        check_epsilon_context(html + COORDINATOR)
    assert f"without {lacking} next to it" in str(refused.value)


@pytest.mark.parametrize(
    "html",
    [
        f"<p>epsilon 3.9 ({CONTEXT})</p>",
        "<p>Unit: one user. \u03b5 = 3.9 at \u03b4 = 1e-5 against peers and network observers.</p>",
        f"<section><h2>Quality against epsilon</h2><p>{CONTEXT}</p><p>0.49</p></section>",
        f"<figure><svg><text>epsilon</text><text>3.9</text></svg><figcaption>{CONTEXT}</figcaption></figure>",
        f"<table><caption>Epsilon ({CONTEXT})</caption><tr><td>3.9</td></tr></table>",
        "<p>nDCG@10 against epsilon</p>",
        "<style>.epsilon{margin:3.9px}</style><p>All is well.</p>",
    ],
)
def test_epsilon_in_context_is_accepted(html: str) -> None:
    """A rule that refuses everything would be switched off."""
    check_epsilon_context(html + COORDINATOR)


def test_epsilon_needs_the_coordinators_line() -> None:
    """Left out, the reader takes the figure to hold against whoever runs the rounds."""
    check_epsilon_context("<p>No epsilon here.</p><p>3.9</p>")
    for line in (
        "",
        "<p>The coordinator sees updates.</p>",
        "<p>None of it matters to the coordinator.</p>",
        f"<p>The coordinator sees updates; epsilon 3.9 ({CONTEXT}).</p>",
    ):
        with pytest.raises(EpsilonContextError, match="against the coordinator"):
            check_epsilon_context(f"<p>epsilon 3.9 ({CONTEXT})</p>{line}")
    check_epsilon_context(
        "<p>epsilon 3.9 (query level, delta 1e-5, against readers of releases); against the coordinator: epsilon 3.9</p>"
    )
