"""The search benchmark as tables of the manual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom_simulations.benchmark_file import outcome


def of_search(benchmark: Mapping[str, Any]) -> str:
    """Searches side by side, kinds of index, growth, clients, goals; and a line that says what it was measured on."""
    figures = benchmark["figures"]
    parts = [
        _table(
            ("search", "p50, ms", "p99, ms", "nDCG@10 (95% interval)", "set up as"),
            [
                (name, f"{of['p50_ms']:.2f}", f"{of['p99_ms']:.2f}", _mean(of), of["how"] or "")
                for name, of in figures["engines"].items()
            ],
        ),
        _table(
            ("index", "Recall@10", "ms a query", "bytes a passage", "built in, s"),
            [
                (kind, f"{of['recall']:.3f}", f"{of['milliseconds']:.2f}", f"{of['bytes']:.0f}", f"{of['seconds']:.1f}")
                for kind, of in figures["kinds"].items()
            ],
        ),
        _table(
            ("passages", "ms to add one, without encoding", "bytes of a passage: store", "vectors", "words"),
            [
                (
                    f"{of['passages']:,}",
                    f"{of['milliseconds']:.2f}",
                    *(f"{of[part]:.0f}" for part in ("store_bytes", "vector_bytes", "word_bytes")),
                )
                for of in figures["growth"]
            ],
        ),
    ]
    if served := figures.get("serving"):
        parts.append(_served(served))
    parts.append(
        _table(
            ("goal", "measured", "outcome"),
            [(of["goal"], f"{of['value']:.3g}" if "value" in of else "", outcome(of)) for of in figures["goals"]],
        )
    )
    return "\n\n".join([*parts, _context(benchmark)])


def _served(served: Mapping[str, Any]) -> str:
    rows = []
    for name in ("closed", "open"):
        of = served[name]
        times = tuple(f"{of[part]:.1f}" for part in ("p50_ms", "p90_ms", "p99_ms"))
        errors = str(sum(of["errors"].values()))
        rows.append((f"{name} loop, {of['seconds']:.0f} s", f"{of['answered_per_second']:.0f}", *times, errors))
    heads = (f"{served['clients']} clients over gRPC", "searches a second", "p50, ms", "p90, ms", "p99, ms", "errors")
    return _table(heads, rows)


def _context(benchmark: Mapping[str, Any]) -> str:
    figures = benchmark["figures"]
    ours, theirs = figures["added_a_second"], figures["padded_onnx_a_second"]
    return (
        f"{benchmark['passages']:,} passages of {', '.join(benchmark['data'])}, {benchmark['questions']:,} dev questions; "
        f"{figures['resident_mb']:.0f} MB resident after 200 searches. Adding: {ours:.0f} passages a second, "
        f"padded ONNX int8 encoding alone {theirs:.0f}. {benchmark['machine']}, "
        f"load {benchmark['load']:.1f} at the end. Measured with `{benchmark['command']}` at {benchmark['commit']}."
    )


def _mean(of: Mapping[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['ndcg_at_10']:.3f} ({low:.3f} to {high:.3f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
