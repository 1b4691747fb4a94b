"""The benchmark of distillation as tables of the manual: arms with quality, seconds, size and latency; memory; goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stillroom_simulations.benchmark_file import outcome

Figures = Mapping[str, Mapping[str, Any]]

_TITLES = {
    "recipes": "every recipe",
    "left-out": "set left out of the text",
    "docstrings": "docstrings alone",
    "matryoshka": "cut vectors",
    "teachers": "one kind of teacher or another",
    "rerank": "rerankers",
}
_WORDS = {
    "kept": "nDCG@10 / the teacher's",
    "int8_kept": "nDCG@10 of int8 / float32",
    "encode_ratio.float32": "p50 of encoding a query, float32 / the teacher's float32",
    "encode_ratio.both-int8": "p50 of encoding a query, int8 / the teacher's int8",
    "encode_ratio.int8": "p50 of encoding a query, int8 / the teacher's float32",
    "gain": "nDCG@10 over the first stage",
    "teacher_gain": "the teacher's nDCG@10 over the first stage",
    "gain_kept": "share of the teacher's gain over the first stage",
    "latency_ratio.float32": "p50 of reading again, float32 / the teacher's float32",
    "latency_ratio.int8": "p50 of reading again, int8 / the teacher's float32",
    "above": "data sets on which it is better than the others",
}


def of_distill(benchmark: Mapping[str, Any]) -> str:
    """A table of arms for each family, then memory, then what came of the goals, then what was measured when."""
    figures, families = benchmark["figures"], benchmark["families"]
    parts = [
        _arms(family, about, figures, list(benchmark["sets"]))
        for family, about in families.items()
        if family in _TITLES
    ]
    if "memory" in families:
        parts.append(_memory(figures))
    goals = [(key, one) for key, one in figures.items() if "goal" in one]
    if goals:
        rows = [(_place(key), _words(key, one), _value(one), one["goal"], outcome(one)) for key, one in goals]
        parts.append(_table(("goal of", "figure", "value (95% interval)", "goal", "outcome"), rows))
    beside = [(key, one) for key, one in figures.items() if "goal" not in one and _is_beside(*_tail(key))]
    if beside:
        plain = [(_place(key), _words(key, one), _value(one)) for key, one in beside]
        parts.append(_table(("beside the goals", "figure", "value (95% interval)"), plain))
    return "\n\n".join([*parts, "\n".join(_context(benchmark))])


def _arms(family: str, about: Mapping[str, Any], figures: Figures, sets: Sequence[str]) -> str:
    """A row for each arm, with the student before training and, once, the teacher."""
    titles = [f"{family}.{name}" for name in about["arms"]]
    shown = [one for one in sets if any(f"{title}.{one}.ndcg_at_10" in figures for title in titles)]
    rows = []
    for title in titles:
        name = title.partition(".")[2]
        qualities = [_quality(figures, title, one) for one in shown]
        rows.append((name, *qualities, _above(figures, title), *_costs(figures, title, family)))
    heads = (_TITLES[family], *(f"{one}, nDCG@10" for one in shown), "mean, above", "s to train", "MB", "p50, ms")
    return _table(heads, rows)


def _quality(figures: Figures, title: str, name: str) -> str:
    """`0.512 (0.498 to 0.527); untrained 0.301; teacher 0.530`."""
    parts = []
    if (own := figures.get(f"{title}.{name}.ndcg_at_10")) is not None:
        parts.append(_value(own))
    for words, role in (("untrained", "untrained.torch"), ("first stage", "first.torch")):
        if (one := figures.get(f"{title}.{name}.{role}.ndcg_at_10")) is not None:
            parts.append(f"{words} {one['value']:.3f}")
    for role in ("teacher.torch", "teacher.float32"):
        if (one := figures.get(f"{title}.{name}.{role}.ndcg_at_10")) is not None:
            parts.append(f"teacher {one['value']:.3f}")
            break
    return "; ".join(parts)


def _above(figures: Figures, title: str) -> str:
    found = []
    for key, one in figures.items():
        if key.startswith(f"{title}.mean.above."):
            low, high = one["interval"]
            other = key.rpartition(".")[2]
            found.append(f"{other}: {one['value']:+.3f} ({low:+.3f} to {high:+.3f}), p {_p(one['p'])}")
    return "; ".join(found)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _costs(figures: Figures, title: str, family: str) -> Iterator[str]:
    """Seconds, megabytes and milliseconds; the last two of each way that it was run, the teacher's last."""
    yield f"{figures[f'{title}.seconds']['value']:,.0f}"
    roles = {
        "student.torch": "torch",
        "student.float32": "float32",
        "student.int8": "int8",
        "teacher.float32": "teacher",
    }
    if f"{title}.teacher.float32.bytes" not in figures:
        roles = {**roles, "teacher.torch": "teacher"}
    for tail, scale, places in (("bytes", 1e6, 1), ("latency", 1.0, 2)):
        found = {words: figures.get(f"{title}.{role}.{tail}") for role, words in roles.items()}
        yield ", ".join(f"{words} {one['value'] / scale:.{places}f}" for words, one in found.items() if one)


def _memory(figures: Figures) -> str:
    sizes: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for key, one in figures.items():
        family, stage, *rest = key.split(".")
        if family == "memory" and rest and rest[0].isdecimal():
            sizes.setdefault(stage, []).append((int(rest[0]), one))
    texts = [size for size, _ in next(iter(sizes.values()))]
    heads = ("largest anonymous memory, MB (seconds)", *(f"{size:,} passages" for size in texts))
    rows = [
        (stage, *(f"{one['value'] / 1e6:,.0f} ({one['seconds']:,.0f})" for _, one in own))
        for stage, own in sizes.items()
    ]
    return _table(heads, rows)


def _words(key: str, one: Mapping[str, Any]) -> str:
    """What a figure is."""
    family = key.partition(".")[0]
    if family == "memory":
        small, large = one["between"]
        return f"bytes a passage and its query that its memory grows by from {small:,} to {large:,} of them"
    if family == "rates":
        return "sentences a second / the plain recipe of Sentence Transformers (least and largest of the repeats)"
    tail = _tail(key)[1]
    if tail.startswith("above."):
        return f"nDCG@10 minus that of {tail.removeprefix('above.')}"
    if tail.startswith("cut-"):
        return f"nDCG@10 of {tail.split('.')[0].removeprefix('cut-')} values / of all"
    return _WORDS[tail]


def _tail(key: str) -> tuple[str, str]:
    """Data set or "mean", and the rest; "" for what is of no set."""
    parts = key.split(".")
    if parts[-1] == "above":
        return "", "above"
    return (parts[2], ".".join(parts[3:])) if len(parts) > 3 else ("", parts[-1])


def _is_beside(place: str, tail: str) -> bool:
    """Whether a figure without a goal stands in the table: means over the sets, of what rows of arms do not show."""
    return place == "mean" and tail != "kept" and (tail in _WORDS or tail.startswith("cut-"))


def _place(key: str) -> str:
    """`left-out align, mean of the sets`."""
    family, *rest = key.split(".")
    if family == "rates":
        return "training"
    if family == "memory":
        return f"memory of {rest[0]}"
    place = _tail(key)[0]
    return f"{family} {rest[0]}" + {"": "", "mean": ", mean of the sets"}.get(place, f", {place}")


def _value(one: Mapping[str, Any]) -> str:
    """Three places, or whole numbers where they are counts and bytes; the interval where there is one."""
    if one["value"] is None:
        return str(one["note"])
    text = f"{one['value']:,.0f}" if one["unit"] in ("bytes", "bytes a passage", "sets") else f"{one['value']:.3f}"
    if "interval" in one:
        low, high = one["interval"]
        text += f" ({low:.3f} to {high:.3f})"
    return text + (f": {', '.join(one['sets'])}" if one.get("sets") else "")


def _context(benchmark: Mapping[str, Any]) -> Iterator[str]:
    """What it was measured on, and each family's command and commit."""
    seeds = len(benchmark["seeds"])
    sets = ", ".join(f"{name} ({digest[:12]})" for name, digest in benchmark["sets"].items())
    rates = benchmark["figures"]
    yield (
        f"Data sets {sets}; {seeds} seed{'s' * (seeds != 1)}; {benchmark['machine']}. MB are those of the model that a query "
        "needs; p50 is of one query on one core, search over all passages included; torch is float32, float32 and int8 run "
        "through ONNX Runtime. Seconds are those of teaching, searching, training and exporting, of models that an arm goes on "
        "from too; a cross-encoder that is taught is taught once and serves all seeds."
    )
    if "rates.ours" in rates:
        ours, plain = rates["rates.ours"], rates["rates.sentence-transformers"]
        yield (
            f"Training: {ours['value']:,.0f} sentences a second (cosine to the teacher {ours['cosine']:.3f}), the plain recipe "
            f"{plain['value']:,.0f} ({plain['cosine']:.3f})."
        )
    for family, about in benchmark["families"].items():
        yield f"{family}: `{about['command']}` at {about['commit']}, {about['date'][:10]}."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
