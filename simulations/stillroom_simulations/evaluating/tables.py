"""An evaluation for the eye: quality, differences and costs, on narrow and wide terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from stillroom_simulations.evaluating.values import Compared, Evaluation, Measured, OnSet, title
from stillroom_simulations.intervals import Interval

_WIDE = 110
_NAME = 14
_SHORT = {"Recall": "R"}


def show(found: Evaluation, console: Console) -> None:
    """Print one block for each data set, and one for the mean over them where there are several."""
    wide = console.width >= _WIDE
    for one in found.sets:
        head = f"{one.name}, {one.split}: {one.queries:,} queries, {one.passages:,} passages"
        console.print(head, style="bold", soft_wrap=True)
        console.print(_quality({m.model: m.intervals for m in one.models}, wide))
        _print_differences(one.comparisons, console)
        console.print("\none query at a time, on one thread: p50/p99" if _timed(one) else "")
        console.print(_costs(one, wide))
        for measured in one.models:
            console.print(f"{measured.model}: {measured.how}", style="dim", soft_wrap=True)
        console.print()
    if found.means:
        console.print(f"mean over {len(found.sets)} data sets, each weighing the same", style="bold")
        console.print(_quality(found.means, wide))
        _print_differences(found.comparisons, console)
        console.print()
    console.print("[low high]: 95% bootstrap intervals over queries. Other figures: --json", style="dim", markup=False)


def _quality(rows: Mapping[str, Mapping[str, Interval]], wide: bool) -> Table:
    """One row a model: each metric with its interval, beside it or below it."""
    table = _table()
    for metric in next(iter(rows.values())):
        table.add_column(_shortened(title(metric)), justify="left" if wide else "right", no_wrap=True)
    for model, intervals in rows.items():
        table.add_row(
            _name(model, wide),
            *(f"{one.value:.3f}{' ' if wide else chr(10)}{_ends(one)}" for one in intervals.values()),
        )
    return table


def _print_differences(comparisons: Sequence[Compared], console: Console) -> None:
    """In the first metric: what tables have room for."""
    if not comparisons:
        return
    metric = comparisons[0].metric
    console.print(f"\nless {comparisons[0].baseline}:", markup=False, soft_wrap=True)
    table = _table()
    for head in (title(metric), "interval", "p", "p (Holm)"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in comparisons:
        if one.metric == metric:
            ends = f"[{one.difference.low:+.3f} {one.difference.high:+.3f}]"
            table.add_row(one.model, f"{one.difference.value:+.3f}", ends, _p(one.p), _p(one.p_holm))
    console.print(table)


def _costs(one: OnSet, wide: bool) -> Table:
    """Milliseconds of one query on one thread, and bytes."""
    table = _table()
    heads = ["encode ms", "search ms", "both ms", "x first"] if _timed(one) else []
    for head in (*heads, "models", "a passage"):
        table.add_column(head, justify="right", no_wrap=True)
    for measured in one.models:
        table.add_row(_name(measured.model, wide), *_latency(measured, one.models[0]), *_bytes(measured))
    return table


def _latency(measured: Measured, first: Measured) -> list[str]:
    if measured.latency is None or first.latency is None:
        return []
    found, base = measured.latency.percentiles(), first.latency.percentiles()
    times = [f"{_ms(found[part]['p50'])}/{_ms(found[part]['p99'])}" for part in ("encode", "search", "total")]
    ratio = found["total"]["p50"] / base["total"]["p50"]
    return [*times, f"{ratio:.2f}" if ratio >= 0.005 else "<.01"]


def _bytes(measured: Measured) -> list[str]:
    found = measured.bytes
    models = " + ".join(_size(value) for value in (found.query_model, found.passage_model) if value)
    return [models or "none", _size(found.each_passage)]


def _timed(one: OnSet) -> bool:
    return all(measured.latency for measured in one.models)


def _table() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold", min_width=10)
    return table


def _name(model: str, wide: bool) -> str:
    """A model for a narrow column: a pair in two lines rather than anywhere.

    >>> _name("release::offline", wide=False)
    'release::\\noffline'
    """
    return model if wide or len(model) <= _NAME else model.replace("::", "::\n")


def _shortened(head: str) -> str:
    name, _, depth = head.partition("@")
    return f"{_SHORT.get(name, name)}@{depth}"


def _ends(one: Interval) -> str:
    """An interval of shares without their zeros.

    >>> _ends(Interval(0.5, 0.401, 0.6)), _ends(Interval(1.0, 1.0, 1.0))
    ('[.401 .600]', '[1.000 1.000]')
    """
    return f"[{' '.join(f'{end:.3f}'.removeprefix('0') for end in one.ends)}]"


def _p(value: float) -> str:
    """A p-value.

    >>> _p(0.0312), _p(1e-5), _p(1.0)
    ('0.031', '<.001', '1.000')
    """
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _ms(value: float) -> str:
    """Milliseconds to three digits or so.

    >>> _ms(0.0312), _ms(4.26), _ms(123.4)
    ('0.03', '4.3', '123')
    """
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _size(value: float) -> str:
    """Bytes as one says them.

    >>> _size(0), _size(384), _size(1536), _size(90_400_000)
    ('0 B', '384 B', '1.5 kB', '90 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 10 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"
