"""Charts: marks lie where the values are, axes hold them, and the picture of the README stands alone."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from copy import deepcopy

import numpy as np
import pytest
from tests.references.results import sample_results

from stillroom_simulations.charts import NARROW, quality_chart, quality_chart_svg, rounds_chart
from stillroom_simulations.epsilon_context import check_epsilon_context
from stillroom_simulations.report import render_report
from stillroom_simulations.results import STAGES, Results
from stillroom_simulations.svg import Scale


def circles(svg: str) -> list[tuple[float, float, str]]:
    root = ElementTree.fromstring(svg)
    found = [
        (float(c.attrib["cx"]), float(c.attrib["cy"]), c.attrib["class"])
        for c in root.iter()
        if c.tag.endswith("circle")
    ]
    width = float(root.attrib["viewBox"].split()[2])
    assert all(0 <= x <= width for x, _, _ in found)
    return found


@pytest.mark.parametrize("width", [720, NARROW])
def test_dots_lie_where_the_values_are(width: int) -> None:
    """A chart whose dots are out of order or out of proportion says something else than its table."""
    results = Results.parse(sample_results())
    dots = circles(quality_chart(results, width=width))
    assert [css for _, _, css in dots] == ["mark", "mark", "hero", "mark", "mark"] * 2
    values = [quality.ndcg_at_10 for quality in results.stages.values()]
    x = [dot[0] for dot in dots[:5]]
    slope, start = np.polyfit(values, x, 1)
    assert slope > 0 and x == pytest.approx(slope * np.array(values) + start, abs=0.1)  # a tenth of a pixel
    assert [y for _, y, _ in dots] == sorted(y for _, y, _ in dots)


def test_rounds_climb_to_the_right() -> None:
    """Upside down or reversed, the same line would show privacy improving with time and quality falling."""
    results = Results.parse(sample_results())
    dots = circles(rounds_chart(results))
    assert [x for x, _, _ in dots] == sorted(x for x, _, _ in dots) and len(dots) == len(results.rounds)
    heights = [one.ndcg_at_10 for one in results.rounds]
    assert np.argmin([y for _, y, _ in dots]) == np.argmax(heights)
    for width in (720, NARROW):
        assert ">3.8<" in rounds_chart(results, width=width) and ">15<" in rounds_chart(results, width=width)


def test_levels_are_of_the_same_queries_as_the_rounds() -> None:
    """A teacher's level from test queries, beside rounds on dev queries, shows a gap that nobody measured."""
    values = sample_results()
    chart = rounds_chart(Results.parse(values))
    assert "Teacher 0.485" in chart and "Student 0.466" in chart and "0.494" not in chart
    assert "Teacher" not in rounds_chart(Results.parse(values | {"rounds_on": None}))
    assert "Student" not in rounds_chart(Results.parse(values | {"rounds": values["rounds"][1:]}))


def test_charts_without_all_their_data() -> None:
    """A run of one round, or without own indexes, must still be reported."""
    values = deepcopy(sample_results())
    for stage in STAGES:
        values[stage] |= {"own_index": None, "intervals": {}, "ndcg_at_10": 0.5}
    values |= {"rounds": values["rounds"][:1], "rounds_nonprivate": [], "examples": [], "ratios": {}}
    results = Results.parse(values)
    assert len(circles(quality_chart(results))) == 5 and len(circles(rounds_chart(results))) == 1
    assert "Own index" not in render_report(results)
    assert circles(rounds_chart(Results.parse(values | {"rounds": [], "rounds_on": None}))) == []


def test_picture_of_the_readme_stands_alone() -> None:
    """Outside the page there is no style sheet: a picture that relied on it would be black on black."""
    svg = quality_chart_svg(Results.parse(sample_results()))
    used = {name for names in re.findall(r'class="([^"]+)"', svg) for name in names.split()} - {"chart"}
    styled = set(re.findall(r"\.([a-z-]+)\{", svg))
    assert used <= styled and "9f2c41d7a0b3" in svg and "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    check_epsilon_context(svg)
    assert len(circles(svg)) == 10


def test_axes_have_round_ticks_around_the_values() -> None:
    """An axis that cuts off its data, or ends between ticks, cannot be read."""
    for values in ([0.4713, 0.5062], [0.5, 0.5], [0.0, 1.0], [1e-4, 3e-4], [0.0, 0.0]):
        scale = Scale.around(values, 0, 100)
        assert scale.ticks[0] <= min(values) and max(values) <= scale.ticks[-1]
        assert 2 <= len(scale.ticks) <= 8 and scale(scale.ticks[-1]) == pytest.approx(100)
        assert [float(scale.label(tick)) for tick in scale.ticks] == list(scale.ticks)
