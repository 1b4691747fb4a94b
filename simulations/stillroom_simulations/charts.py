"""Charts as hand-written SVG: quality by stage, and quality over rounds with the privacy they cost.

Each chart is a function from `Results` and a width to one `<svg>`. Colours are left to CSS classes: the report gives
them for light and for dark, and so does `svg.standalone`, on a ground of its own. Values are labelled directly: no
legend, and no meaning by colour alone. Axes of dots and lines need not begin at 0; their ticks say where they do.

| class | is |
|---|---|
| `ink`, `soft` | text, and text of lesser weight |
| `rule`, `reference` | ticks and axes; a level to compare with |
| `mark`, `hero` | a stage; the stage this is about (after private rounds) |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stillroom_simulations import svg
from stillroom_simulations.results import OwnIndexQuality, Results, Stage
from stillroom_simulations.svg import Scale

WIDE, NARROW = 720, 340
STAGE_NAMES: dict[Stage, str] = {
    "teacher": "Teacher",
    "student": "Student",
    "federated": "After private rounds",
    "federated_nonprivate": "After non-private rounds",
    "device": "On the device, int8",
}


def quality_chart(results: Results, *, width: int = WIDE) -> str:
    """nDCG@10 of every stage with 95% intervals: over the whole private corpus, and over each own index."""
    words, body, height = _dot_panels(results, width)
    return svg.drawing((0, 0, width, height - 14), words, body)


def quality_chart_svg(results: Results) -> str:
    """The same as a file that stands alone, for the README: readable on white and on dark pages."""
    words, body, height = _dot_panels(results, WIDE)
    origin = results.corpus
    note = f"nDCG@10, 95% intervals. {origin.name} {origin.hash[:12]}, {results.scale} scale, seed {results.seed}"
    return svg.standalone(WIDE, height, words, body + svg.text(0, height + 4, note, "soft small"))


def rounds_chart(results: Results, *, width: int = WIDE) -> str:
    """nDCG@10 over rounds, private and not, from the student's level towards the teacher's, with the epsilon spent."""
    left, right, top, bottom = 38, width - (96 if width < WIDE else 136), 12, 236
    private = [(r.round, r.ndcg_at_10) for r in results.rounds]
    baseline = [(r.round, r.ndcg_at_10) for r in results.rounds_nonprivate]
    levels = {"Teacher": results.rounds_on.teacher_ndcg_at_10} if results.rounds_on else {}
    if private and private[0][0] == 0:
        levels["Student"] = private[0][1]
    x = Scale(0, max([1, *(n for n, _ in private + baseline)]), 1, left, right)
    y = Scale.around([*levels.values(), *(q for _, q in private + baseline)] or [0, 1], bottom, top)

    body = ""
    for tick in y.ticks:
        body += svg.line(left, y(tick), right, y(tick), "rule")
        body += svg.text(left - 6, y(tick) + 4, y.label(tick), "soft small end")
    body += "".join(svg.line(left, y(level), right, y(level), "reference") for level in levels.values())
    body += svg.path([(x(n), y(q)) for n, q in baseline], "mark line thin")
    body += svg.path([(x(n), y(q)) for n, q in private], "hero line")
    body += "".join(svg.dot(x(n), y(q), 2.6, "hero") for n, q in private)
    ends = [(name, level, "soft") for name, level in levels.items()]
    ends += [("Without privacy", baseline[-1][1], "ink")] if baseline else []
    ends += [("Private", private[-1][1], "hero-text bold")] if private else []
    body += spread([(name, y(level), css) for name, level, css in ends], right + 8, bottom)
    body += _round_axis(
        x, {r.round: r.epsilon for r in results.rounds} or dict.fromkeys(n for n, _ in baseline), bottom
    )
    words = f"nDCG@10 over {results.privacy.rounds} rounds. " + ", ".join(f"{name} {q:.3f}" for name, q, _ in ends)
    return svg.drawing((0, 0, width, bottom + 48), words, body)


def _round_axis(x: Scale, spent: Mapping[int, float | None], bottom: float, gap: float = 40) -> str:
    """Two lines of labels: measured rounds, as many as have room, always the last; and the epsilon spent by then."""
    kept: list[int] = []
    for number in sorted(spent, reverse=True):
        if not kept or x(kept[-1]) - x(number) >= gap:
            kept.append(number)
    body = ""
    for number in reversed(kept):
        cost = spent[number]
        body += svg.line(x(number), bottom, x(number), bottom + 4, "rule")
        body += svg.text(x(number), bottom + 20, str(number), "soft small mid")
        body += (
            svg.text(x(number), bottom + 38, f"{math.ceil(cost * 10) / 10:.1f}", "hero-text small mid")
            if cost is not None
            else ""
        )
    body += svg.text(x.end + 18, bottom + 20, "round", "soft small")
    if any(cost is not None for cost in spent.values()):
        body += svg.text(x.end + 18, bottom + 38, "epsilon", "hero-text small")
    return body


def _dot_panels(results: Results, width: int) -> tuple[str, str, float]:
    """(the chart in words, its marks, its height)."""
    whole: dict[Stage, OwnIndexQuality] = dict(results.stages)
    own = {stage: quality.own_index for stage, quality in results.stages.items() if quality.own_index}
    words, body, height = "nDCG@10.", "", 0.0
    for title, stages in (("Whole private corpus", whole), ("Own index of each device", own)):
        if stages:
            drawn, height = _dot_panel(title, stages, width, height)
            body += drawn
            words += f" {title}: " + ", ".join(f"{STAGE_NAMES[s]} {q.ndcg_at_10:.3f}" for s, q in stages.items()) + "."
    return words, body, height


def _dot_panel(title: str, stages: Mapping[Stage, OwnIndexQuality], width: int, top: float) -> tuple[str, float]:
    """One panel, and where the next begins. Narrow panels have the words above the marks."""
    row, lift, reach = (44, 16, 9) if width < WIDE else (27, 0, 14)
    left, right = (6, width - 6) if width < WIDE else (190, width - 168)
    ends = {stage: quality.intervals.get("ndcg_at_10", (quality.ndcg_at_10,) * 2) for stage, quality in stages.items()}
    shown = [value for pair in ends.values() for value in pair] + [quality.ndcg_at_10 for quality in stages.values()]
    x = Scale.around(shown, left, right)
    body = svg.text(0, top + 14, title, "ink bold")
    for number, (stage, quality) in enumerate(stages.items()):
        line = top + 44 + row * number
        y = line + lift
        css, words = ("hero", "hero-text bold") if stage == "federated" else ("mark", "ink")
        low, high = ends[stage]
        if "teacher" in stages:
            level = x(stages["teacher"].ndcg_at_10)
            body += svg.line(level, y - reach, level, y + reach, "reference")
        body += svg.text(0, line + 4, STAGE_NAMES[stage], words)
        body += svg.text(width - 108, line + 4, f"{quality.ndcg_at_10:.3f}", f"{words} end")
        body += svg.text(width, line + 4, f"{low:.3f} to {high:.3f}", "soft small end")
        body += svg.line(x(low), y, x(high), y, f"{css} whisker") + svg.dot(x(quality.ndcg_at_10), y, 4.5, css)
    floor = top + 44 + row * (len(stages) - 1) + lift + 14
    body += svg.line(left, floor, right, floor, "rule")
    for tick in x.ticks:
        body += svg.line(x(tick), floor, x(tick), floor + 4, "rule")
        body += svg.text(x(tick), floor + 17, x.label(tick), "soft small mid")
    return body, floor + 42


def spread(labels: Sequence[tuple[str, float, str]], x: float, bottom: float, gap: float = 15) -> str:
    """Labels at the right end of lines, pushed apart where they would overlap and kept above the axis."""
    ordered = sorted(labels, key=lambda label: label[1])
    places: list[float] = []
    for _, y, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], bottom - gap * (len(places) - 1 - i))
    return "".join(svg.text(x, y + 4, name, f"{css} small") for y, (name, _, css) in zip(places, ordered, strict=True))
