"""Hand-written SVG: axes, lines and words that every chart is made of.

Colours are left to CSS classes (listed in `charts`): a page gives them for light and for dark, and `standalone` does so on a
ground of its own, for pages whose theme is not the reader's system's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_SVG = "http://www.w3.org/2000/svg"
# A picture in a README may stand on a page whose theme is not the reader's system's: it brings its own ground.
_STANDALONE_STYLE = """
:root{--paper:#fff;--ink:#1f1e1b;--soft:#625e56;--rule:#ddd7cb;--faint:#8f897d;--hero:#00695f}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#eae7e0;--soft:#aaa59b;--rule:#34363b;--faint:#7b776f;
--hero:#5ecfbc}}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
.paper{fill:var(--paper)}.ink{fill:var(--ink)}.soft{fill:var(--soft)}.bold{font-weight:600}.small{font-size:11.5px}
.end{text-anchor:end}.mid{text-anchor:middle}.hero-text{fill:var(--hero)}.rule{stroke:var(--rule)}
.reference{stroke:var(--faint);stroke-dasharray:2 3}.mark{stroke:var(--faint);fill:var(--faint)}
.hero{stroke:var(--hero);fill:var(--hero)}.whisker{stroke-width:1.75}
.line{fill:none;stroke-width:1.75}.thin{stroke-width:1.25}
"""
_MARGIN = 24


@dataclass(frozen=True)
class Scale:
    """A linear axis from `low` to `high`, drawn from pixel `start` to pixel `end`.

    >>> Scale.around([0.471, 0.506], 0, 100).ticks
    (0.47, 0.48, 0.49, 0.5, 0.51)
    """

    low: float
    high: float
    step: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, ticks: int = 5) -> Scale:
        """The smallest axis with round ticks that holds all values."""
        found = list(values)
        low, high = min(found), max(found)
        step = round_step((high - low) or 0.1, ticks)
        floor = math.floor(low / step + 1e-9) * step
        return cls(floor, max(math.ceil(high / step - 1e-9) * step, floor + step), step, start, end)

    def __call__(self, value: float) -> float:
        """Where a value lies, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round values from one end to the other."""
        count = round((self.high - self.low) / self.step)
        return tuple(round(self.low + i * self.step, 10) for i in range(count + 1))

    def label(self, value: float) -> str:
        """A tick with as many decimals as the step needs."""
        return f"{value:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"


def round_step(span: float, ticks: int) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50, ... (and tenths of these) that divides a span into at most `ticks`."""
    rough = span / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))


def standalone(width: float, height: float, words: str, body: str) -> str:
    """A chart as a file that stands alone, readable on white and on dark pages."""
    box = (-_MARGIN, -_MARGIN + 4, width + 2 * _MARGIN, height + 2 * _MARGIN)
    ground = f'<rect x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{box[3]:.0f}" rx="8" class="paper"/>'
    return drawing(box, words, f"<style>{_STANDALONE_STYLE}</style>{ground}{body}")


def drawing(box: tuple[float, float, float, float], words: str, body: str) -> str:
    """One `<svg>` over a box (left, top, width, height); `words` say to whoever cannot see it what it shows."""
    size = f'viewBox="{" ".join(f"{number:.0f}" for number in box)}" width="{box[2]:.0f}" height="{box[3]:.0f}"'
    return f'<svg xmlns="{_SVG}" {size} role="img" aria-label="{escape(words)}" class="chart">{body}</svg>'


def dot(x: float, y: float, radius: float, css: str) -> str:
    """A filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"/>'


def text(x: float, y: float, words: str, css: str) -> str:
    """Words that begin at x, or end or are centred there by class `end` or `mid`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def path(points: Sequence[tuple[float, float]], css: str) -> str:
    """A line through all points, nothing without any."""
    steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{css}"/>' if points else ""
