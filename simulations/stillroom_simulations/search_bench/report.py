"""The search benchmark for the eye: tables on the terminal, and how costs grow as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stillroom_simulations import svg
from stillroom_simulations.charts import WIDE
from stillroom_simulations.svg import Scale

_HEIGHT = 236


def show(made: Mapping[str, Any], *, console: Console, chart: Path) -> None:
    """Print what was measured; draw the cost of a passage over sizes when there are several."""
    figures = made["figures"]
    table = Table("search", "p50 ms", "p99 ms", "nDCG@10", "set up as", title=f"{made['passages']:,} passages")
    for name, of in figures["engines"].items():
        low, high = of["interval"]
        quality = f"{of['ndcg_at_10']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(name, f"{of['p50_ms']:.2f}", f"{of['p99_ms']:.2f}", quality, of["how"])
    console.print(table)
    table = Table("index", "Recall@10", "ms a query", "bytes a passage", "built in s")
    for name, of in figures["kinds"].items():
        table.add_row(
            name, f"{of['recall']:.3f}", f"{of['milliseconds']:.2f}", f"{of['bytes']:.0f}", f"{of['seconds']:.1f}"
        )
    console.print(table)
    table = Table("passages", "ms to add one, without encoding", "bytes: store", "vectors", "words", "kind")
    for size in figures["growth"]:
        parts = (f"{size[name]:.0f}" for name in ("store_bytes", "vector_bytes", "word_bytes"))
        table.add_row(f"{size['passages']:,}", f"{size['milliseconds']:.3f}", *parts, size["kind"])
    console.print(table)
    if served := figures.get("serving"):
        table = Table(
            "served", "searches a second", "p50 ms", "p90 ms", "p99 ms", "errors", title=f"{served['clients']} clients"
        )
        for name in ("closed", "open"):
            of = served[name]
            times = (f"{of[part]:.1f}" for part in ("p50_ms", "p90_ms", "p99_ms"))
            table.add_row(f"{name} loop", f"{of['answered_per_second']:.0f}", *times, str(sum(of["errors"].values())))
        console.print(table)
    table = Table("goal", "measured", "holds")
    for goal in figures["goals"]:
        table.add_row(goal["goal"], f"{goal['value']:.3g}" if "value" in goal else "", "yes" if goal["holds"] else "no")
    console.print(table)
    if len(figures["growth"]) > 1:
        chart.parent.mkdir(parents=True, exist_ok=True)
        chart.write_text(drawing(figures["growth"]), encoding="utf-8")


def drawing(growth: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds to add one more passage, over the passages that are there (logarithmic), as a picture that stands alone."""
    # A step of a few percent is added beside the index, not into it: its cost says nothing.
    growth = [of for n, of in enumerate(growth) if not n or of["passages"] > 1.1 * growth[n - 1]["passages"]]
    left, right, floor = 38, WIDE - 40, _HEIGHT
    sizes, costs = [of["passages"] for of in growth], [of["milliseconds"] for of in growth]
    y = Scale.around([0.0, *costs], floor, 34)
    x = Scale(math.log10(sizes[0]), math.log10(sizes[-1]), 1, left + 20, right - 20)
    body = svg.text(0, 14, "Milliseconds to add one passage, without encoding it", "ink bold")
    for tick in y.ticks:
        body += svg.line(left, y(tick), right, y(tick), "rule")
        body += svg.text(left - 6, y(tick) + 4, y.label(tick), "soft small end")
    at = [(x(math.log10(size)), y(cost)) for size, cost in zip(sizes, costs, strict=True)]
    body += svg.path(at, "hero line thin")
    for (across, up), of in zip(at, growth, strict=True):
        body += svg.dot(across, up, 4, "hero")
        body += svg.text(across, up - 10, f"{of['milliseconds']:.2f}", "soft small mid")
        body += svg.text(across, floor + 20, _short(of["passages"]), "soft small mid")
    body += svg.text(left + 20, floor + 40, "passages in the index; storing, both indexes, checkpoints", "soft small")
    said = ", ".join(f"{of['milliseconds']:.2f} ms up to {of['passages']:,}" for of in growth)
    return svg.standalone(WIDE, floor + 44, f"Cost of adding a passage: {said}.", body)


def _short(count: int) -> str:
    return f"{count // 1_000_000} M" if count >= 1_000_000 else f"{count // 1_000} k"
