"""What an examination of an index looks like: on a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from stillroom_client.doctor import ENOUGH, Examination
from stillroom_client.index_check import Latency
from stillroom_client.show import plain

_HOLDS = {"missing": "had not been built", "stale": "was of an earlier state", "torn": "was damaged"}


def report_lines(found: Examination) -> Iterator[str]:
    """A line for each thing that was measured, then what is wrong or remarkable with what to do, then the verdict."""
    for label, value in _measured(found):
        yield f"{label:13} {value}"
    for finding in found.findings:
        yield f"{finding.level + ':':13} {plain(finding.text)}"
        yield f"{'':13} {plain(finding.remedy)}"
    wrong = sum(finding.level == "wrong" for finding in found.findings)
    yield "well" if found.well else f"{wrong} thing{'s' if wrong > 1 else ''} to mend"


def _measured(found: Examination) -> Iterator[tuple[str, str]]:
    measures = found.measures
    yield "device", f"{plain(found.name)}, {found.passages:,} passages, generation {found.generation}"
    for name, state in found.states.items():
        yield name, "current" if state == "current" else f"the file {_HOLDS[state]}; it is current now"
    if measures.recall is not None:
        settings = ", ".join(f"{name} {value}" for name, value in measures.knobs.settings.items())
        kind = measures.knobs.kind + (f", {settings}" if settings else "")
        yield "recall@10", f"{measures.recall} of exact search (95%), goal {found.goal:g}; {kind}"
        yield "asked", _asked(found)
    if measures.index_latency and measures.exact_latency and found.search_latency:
        yield (
            "speed",
            (
                f"index {_ms(measures.index_latency)}, exact {_ms(measures.exact_latency)}, "
                f"whole search {_ms(found.search_latency)}; p50 / p99"
            ),
        )
    for name, size in found.bytes.items():
        share = found.dead.get({"store.sqlite3": "store", "index.faiss": "vectors"}.get(name, "words"), 0.0)
        each = f", {size / found.passages:,.0f} a passage" if found.passages else ""
        yield name, f"{size:,} bytes{each}; {share:.1%} dead"
    if (counts := found.cache).same + counts.near + counts.missed:
        yield "cache", f"{counts.hit_rate:.1%} of searches of this process ({counts.same:,} same, {counts.near:,} near)"


def _asked(found: Examination) -> str:
    own, stand_ins = found.sample.own, found.sample.stand_ins
    if not stand_ins:
        return f"{own:,} queries of yours whose results you opened"
    return (
        f"{own:,} queries of yours, fewer than {ENOUGH}, and {stand_ins:,} beginnings of passages in their place: "
        "real queries may fare otherwise"
    )


def to_json(found: Examination) -> dict[str, Any]:
    """All of it."""
    fields = asdict(found)
    fields["cache"]["hit_rate"] = found.cache.hit_rate
    return {**fields, "well": found.well}


def _ms(latency: Latency) -> str:
    return f"{latency.p50:.2f} / {latency.p99:.2f} ms"
