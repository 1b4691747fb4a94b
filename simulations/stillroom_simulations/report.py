"""One self-contained page about a run: quality, privacy, sizes, searches; drawn from `Results` and from nothing else.

No external asset, no script: the page can be mailed, archived, and read in ten years. The same figures lie beside it in
results.json. The page is refused when it prints an epsilon without unit, delta and adversary (`check_epsilon_context`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stillroom_shared.statement import COORDINATOR, OBSERVERS, printed_epsilon
from stillroom_simulations.charts import NARROW, STAGE_NAMES, quality_chart, rounds_chart
from stillroom_simulations.epsilon_context import EpsilonContextError, check_epsilon_context
from stillroom_simulations.evaluate import METRICS
from stillroom_simulations.results import Example, ExampleStage, OwnIndexQuality, Privacy, Result, Results, Stage

__all__ = ["EpsilonContextError", "check_epsilon_context", "render_report", "rewrite_report", "write_report"]

_GOALS = {
    "student_to_teacher": "Student / teacher",
    "federated_to_teacher": "Private rounds / teacher",
    "device_loss": "Lost on the device",
}
_TOWERS: tuple[ExampleStage, ...] = ("teacher", "student", "federated")
_SNIPPET = 200
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def write_report(results: Results | Mapping[str, Any], folder: Path) -> Path:
    """Write results.json and report.html into `folder`, with the same figures; returns the page.

    Raises:
        DataError: the results do not fit the schema; nothing is written.
        EpsilonContextError: the page would print an epsilon out of context; nothing is written.
    """
    checked = results if isinstance(results, Results) else Results.parse(results)
    page = render_report(checked)
    folder.mkdir(parents=True, exist_ok=True)
    checked.save(folder / "results.json")
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def rewrite_report(folder: Path) -> Path:
    """Draw report.html again from the results.json in `folder`."""
    return write_report(Results.load(folder / "results.json"), folder)


def render_report(results: Results) -> str:
    """The page as HTML, checked for epsilons out of context."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "figure": "{:.3f}".format,
        "count": "{:,.0f}".format,
        "size": human_size,
        "seconds": human_seconds,
        "scientific": scientific,
        "epsilon": printed_epsilon,
        "snippet": snippet,
        "millions": lambda value: f"{value / 1e6:.1f} million" if value >= 1e6 else f"{value:,}",
    }
    template = (resources.files("stillroom_simulations") / "report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        results=results,
        headline=headline(results),
        guarantee=guarantee(results.privacy),
        against_coordinator=against_coordinator(results.privacy),
        adversaries=adversaries(results.privacy),
        charts={
            "quality": _both_widths(quality_chart(results), quality_chart(results, width=NARROW)),
            "rounds": _both_widths(rounds_chart(results), rounds_chart(results, width=NARROW)),
        },
        tables=_quality_tables(results),
        goals=[(_GOALS.get(key, key.replace("_", " ")), ratio) for key, ratio in results.ratios.items()],
        examples=[_example(example) for example in results.examples],
        metrics=dict(zip(METRICS, ("nDCG@10", "Recall@10", "MRR@10"), strict=True)),
        stage_names=STAGE_NAMES,
    )
    check_epsilon_context(page)
    return page


def headline(results: Results) -> str:
    """The outcome in one sentence, whichever way it went."""
    share = results.federated.ndcg_at_10 / max(results.teacher.ndcg_at_10, 1e-9)
    change = results.federated.ndcg_at_10 - results.student.ndcg_at_10
    rounds = f"{results.privacy.rounds} private round{'s' * (results.privacy.rounds != 1)}"
    verb = "bring" if results.privacy.rounds != 1 else "brings"
    if change > 0:
        return f"{rounds} {verb} a small query tower to {share:.1%} of its teacher"
    return f"{rounds} cost the query tower {-change:.3f} nDCG@10, and leave it at {share:.1%} of its teacher"


def guarantee(privacy: Privacy) -> str:
    """The guarantee in one line, with everything an epsilon needs beside it."""
    if privacy.epsilon is None:
        return f"no differential privacy (mechanism {privacy.mechanism}); coordinator: none"
    return (
        f"epsilon {printed_epsilon(privacy.epsilon)} ({privacy.unit} level, delta {scientific(privacy.delta)}, against "
        f"{privacy.adversary}); against the coordinator: {against_coordinator(privacy)}"
    )


def against_coordinator(privacy: Privacy) -> str:
    """What holds against the coordinator, in words that `check_epsilon_context` looks for."""
    return "none" if privacy.coordinator == "none" else f"epsilon {printed_epsilon(privacy.coordinator)}"


def adversaries(privacy: Privacy) -> list[tuple[str, str, str]]:
    """(adversary, how it was accounted, epsilon or "none"); the coordinator's line is always the last."""
    rows = [
        (privacy.adversary, name if name == privacy.accountant else f"{name}, cross-check", _spent(value))
        for name, value in privacy.epsilon_by_accountant.items()
    ]
    others = {
        who: value for who, value in privacy.against.items() if who != privacy.adversary and "coordinator" not in who
    }
    rows += [
        (who, f"{privacy.accountant}, no sampling" if who == OBSERVERS else privacy.accountant, _spent(value))
        for who, value in others.items()
    ]
    if privacy.coordinator == "none":
        return [*rows, (COORDINATOR, "sees single updates", "none")]
    return [*rows, (COORDINATOR, "sees single updates, private already", printed_epsilon(privacy.coordinator))]


def human_size(value: float) -> str:
    """Bytes for people.

    >>> human_size(392), human_size(37_624), human_size(20_114_432), human_size(3_060_000_000)
    ('392 bytes', '36.7 KiB', '19.2 MiB', '2.8 GiB')
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {unit}"
    return f"{value:.0f} bytes"


def human_seconds(value: float) -> str:
    """A duration for people.

    >>> human_seconds(0.62), human_seconds(59.96), human_seconds(148)
    ('0.6 s', '1 min 00 s', '2 min 28 s')
    """
    if round(value, 1) < 60:
        return f"{value:.1f} s"
    return f"{round(value) // 60} min {round(value) % 60:02d} s"


def scientific(value: float) -> str:
    """A small probability.

    >>> scientific(1.16e-4), scientific(0.0)
    ('1.2\u202f\u00d7\u202f10\u207b\u2074', '0')
    """
    if value == 0:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    raised = str(int(power)).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )
    return f"{digits}\u202f\u00d7\u202f10{raised}"


def snippet(text: str) -> str:
    """The beginning of a passage on one line, cut between words.

    >>> snippet("one  two\\nthree"), len(snippet("word " * 99)) <= 201
    ('one two three', True)
    """
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else f"{line[:_SNIPPET].rsplit(' ', 1)[0]}\u2026"


def _spent(value: float | None) -> str:
    return "none" if value is None else printed_epsilon(value)


def _both_widths(wide: str, narrow: str) -> Markup:
    """A chart drawn for wide and for narrow windows; the style sheet shows one of them."""
    return Markup('<div class="for-wide">{}</div><div class="for-narrow">{}</div>').format(Markup(wide), Markup(narrow))


def _quality_tables(results: Results) -> list[tuple[str, Mapping[Stage, OwnIndexQuality]]]:
    own = {stage: quality.own_index for stage, quality in results.stages.items() if quality.own_index}
    tables: list[tuple[str, Mapping[Stage, OwnIndexQuality]]] = [
        ("Every query over the whole private corpus", results.stages),
        ("Every query over its own device\u2019s index", own),
    ]
    return [(caption, rows) for caption, rows in tables if rows]


def _example(example: Example) -> dict[str, Any]:
    """What each tower returns first, and where the answer is when it is not first."""
    columns = []
    for tower in _TOWERS:
        ranking = example.results.get(tower, ())
        columns.append((STAGE_NAMES[tower], ranking[0] if ranking else None, _place_of_answer(ranking)))
    return {"query": example.query, "owner": example.owner, "answer": example.answer_id, "columns": columns}


def _place_of_answer(ranking: tuple[Result, ...]) -> str:
    for rank, result in enumerate(ranking, start=1):
        if result.relevant:
            return "the answer is first" if rank == 1 else f"the answer is number {rank}"
    return f"the answer is not among the first {len(ranking)}" if ranking else "nothing was found"
