"""What privacy costs, drawn: the share of the non-private gain that survives at each epsilon, a panel for each corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom_shared.statement import READERS
from stillroom_simulations import svg
from stillroom_simulations.charts import WIDE, spread
from stillroom_simulations.svg import Scale

FAMILIES = {
    "central": "central, sampled cohorts",
    "correlated": "correlated noise, turns",
    "turns": "fresh noise, turns",
    "local": "local, query level",
}
"""Families of arms, in the words of the chart; the first is drawn as the hero."""

Curves = Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]
"""(target epsilon, figure) by family, ascending."""

_HEIGHT = 236
_NUDGE = 5  # pixels between the whiskers of families at one epsilon


def utility_chart_svg(benchmark: Mapping[str, Any]) -> str:
    """The content of a benchmark file of `stillroom bench privacy` as a picture that stands alone."""
    body, words, top = "", [], 0.0
    panels = {corpus: curves for corpus in benchmark["corpora"] if (curves := _curves(benchmark, corpus))}
    targets = sorted({target for curves in panels.values() for curve in curves.values() for target, _ in curve})
    for corpus, curves in panels.items():
        drawn, said = _panel(corpus, curves, targets, top)
        body += drawn
        words.append(said)
        top += _HEIGHT + 84
    deltas = sorted({spent["delta"] for spent in benchmark["privacy"].values()}, reverse=True)
    note = (
        f"epsilon against {READERS}, user level (local: query level), at",
        f"delta {', '.join(f'{delta:.1e}' for delta in deltas)}; against the coordinator: none, but under local the same",
    )
    for place, line in enumerate(note):
        body += svg.text(0, top + 18 * place, line, "soft small")
    said = f"Share of the non-private gain that survives; {' '.join(note)}. {' '.join(words)}"
    return svg.standalone(WIDE, top + 18, said, body)


def _panel(corpus: str, curves: Curves, targets: Sequence[float], top: float) -> tuple[str, str]:
    """One corpus, from `top` on, over the epsilons of all, and the same in words."""
    left, right, floor = 38, WIDE - 168, top + _HEIGHT
    ends = [end for curve in curves.values() for _, figure in curve for end in figure["interval"]]
    y = Scale.around([0.0, 1.0, *ends], floor, top + 34)
    x = Scale(math.log2(targets[0]), max(math.log2(targets[-1]), math.log2(targets[0]) + 1), 1, left + 20, right - 20)
    body = svg.text(0, top + 14, f"Share of the non-private gain, {corpus}", "ink bold")
    for tick in y.ticks:
        body += svg.line(left, y(tick), right, y(tick), "reference" if tick == 1 else "rule")
        body += svg.text(left - 6, y(tick) + 4, y.label(tick), "soft small end")
    labels = []
    for place, (family, curve) in enumerate(curves.items()):
        css, text = ("hero", "hero-text bold") if family == next(iter(FAMILIES)) else ("mark", "ink")
        at = [(x(math.log2(target)) + _NUDGE * place, figure) for target, figure in curve]
        body += svg.path([(across, y(figure["value"])) for across, figure in at], f"{css} line thin")
        for across, figure in at:
            low, high = figure["interval"]
            body += svg.line(across, y(low), across, y(high), f"{css} whisker")
            body += svg.dot(across, y(figure["value"]), 4, css)
        labels.append((FAMILIES[family], y(at[-1][1]["value"]), text))
    body += spread(labels, right + 8, floor)
    for target in targets:
        body += svg.line(x(math.log2(target)), floor, x(math.log2(target)), floor + 4, "rule")
        body += svg.text(x(math.log2(target)), floor + 20, f"{target:g}", "soft small mid")
    body += svg.text(right + 8, floor + 20, "epsilon", "soft small")
    said = "; ".join(
        f"{FAMILIES[family]} " + ", ".join(f"{figure['value']:.2f} at {target:g}" for target, figure in curve)
        for family, curve in curves.items()
    )
    return body, f"{corpus}: {said}."


def _curves(benchmark: Mapping[str, Any], corpus: str) -> Curves:
    """(target epsilon, figure) by family, ascending, of the arms that were measured on a corpus."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for family in FAMILIES:
        for name, figure in benchmark["figures"].items():
            on, arm, what = name.rsplit(".", 2) if name.count(".") == 2 else ("", "", "")
            if on == corpus and what == "share_of_nonprivate_gain" and arm.rpartition("-")[0] == family:
                found.setdefault(family, []).append((float(arm.rpartition("-")[2]), figure))
    return {family: sorted(curve, key=lambda point: point[0]) for family, curve in found.items()}
