"""What search results look like on a terminal.

Documents are untrusted text: nothing in them is read as markup, and no control or invisible formatting character of
theirs reaches the terminal.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from stillroom_client.analysis import spelled_out, terms, words
from stillroom_client.ranking import Hit
from stillroom_shared.statement import COORDINATOR, READERS, printed_epsilon

if TYPE_CHECKING:
    from stillroom_client.budget import BudgetReport, Guarantee

_WORD = re.compile(r"\w+")
_SNIPPET_LETTERS = 180


def hits_table(hits: Sequence[Hit], query: str) -> Table:
    """Rank, score, owner, passage and the most relevant sentence of each hit; its ranks in both lists where they were fused."""
    fused = any(hit.bm25_rank for hit in hits) and any(hit.dense_rank for hit in hits)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="dim")
    table.add_column("#", justify="right", style="dim")
    table.add_column("score", justify="right")
    if fused:
        table.add_column("dense", justify="right", style="dim")
        table.add_column("bm25", justify="right", style="dim")
    table.add_column("owner", overflow="fold", max_width=16)
    table.add_column("passage", overflow="fold", max_width=36, style="cyan")
    table.add_column("text", overflow="fold")
    for hit in hits:
        found = highlighted(snippet(hit.text, query), query)
        if where := ", ".join(part for part in (plain(hit.document.rpartition("/")[2]), str(hit.position)) if part):
            found = Text.assemble(found, "\n", (where, "dim"))
        if title := plain(hit.title):
            found = Text.assemble((title, "bold"), "\n", found)
        ranks = [str(rank or "-") for rank in (hit.dense_rank, hit.bm25_rank)] if fused else []
        table.add_row(
            str(hit.rank), f"{hit.score:.3f}", *ranks, Text(plain(hit.owner)), Text(plain(hit.passage_id)), found
        )
    return table


def budget_tables(report: BudgetReport) -> list[Table | str]:
    """What was spent on what, and each sum with the adversary it holds against."""
    spent = Table(
        title=Text(f"What {plain(report.device)} took part in"), title_justify="left", box=None, header_style="dim"
    )
    for name in ("federation", "rounds", "attempts charged", "declined"):
        spent.add_column(name, justify="left" if name == "federation" else "right", overflow="fold")
    for row in report.spent:
        spent.add_row(Text(plain(row.federation)), f"{row.rounds:,}", f"{row.attempts:,}", f"{row.declined:,}")
    sums = Table(title="What that costs", title_justify="left", box=None, header_style="dim", padding=(0, 2, 1, 0))
    for name in ("against", "what counts", "spent", "limit", "left"):
        sums.add_column(name, overflow="fold")
    consent, limit = report.consent, report.consent.limit_epsilon
    sums.add_row(
        report.own.adversary,
        f"its own {sum(row.attempts for row in report.spent):,} attempts, un-amplified",
        _guarantee(report.own),
        f"{consent.participations:,} attempts"
        + ("" if limit is None else f", epsilon {limit:g} ({report.own.unit} level, delta {consent.limit_delta:.1e})"),
        f"{report.left_participations:,} attempts"
        + (
            ""
            if report.left_epsilon is None
            else f", {math.floor(report.left_epsilon * 100) / 100:.2f} of that epsilon"
        ),
    )
    released = report.released
    sums.add_row(
        READERS,
        "all rounds" if report.released_rounds is None else f"all {report.released_rounds:,} rounds",
        Text(released if isinstance(released, str) else _guarantee(released)),
        "the operator's",
    )
    if report.coordinator is None:
        sums.add_row(COORDINATOR, "single updates", "no guarantee (none)")
    else:
        sums.add_row(COORDINATOR, "single updates, private already", _guarantee(report.coordinator))
    return [spent if report.spent else "This device took part in no round yet.", "", sums, *_notes(report)]


def _notes(report: BudgetReport) -> list[str]:
    notes = []
    for seen in report.seen:
        if seen.head is not None:
            notes.append(
                f"The ledger of {plain(seen.federation)} had {seen.rows:,} rows when last answered: head {seen.head}"
            )
        if seen.refused is not None:
            notes.append(f"The last order of {plain(seen.federation)} was not followed: {plain(seen.refused)}")
    if report.rehearsal:
        notes.append("Rehearsal: the noise of the rounds came from a known seed, and binds nobody who knows it.")
    if not report.consent.takes_part:
        notes.append("The owner has left: this device declines every round.")
    if report.needs_limit:
        notes.append("Rounds under `local` are declined until a limit is set: `stillroom budget --limit EPSILON`.")
    if report.left_participations == 0:
        notes.append("Nothing is left: this device declines every round. The owner may raise the limit.")
    return notes


def _guarantee(found: Guarantee) -> str:
    """For a row that names the adversary."""
    value = f"epsilon {printed_epsilon(found.epsilon)}" if math.isfinite(found.epsilon) else "no guarantee"
    return f"{value} ({found.unit} level, delta {found.delta:.1e})"


def snippet(text: str, query: str, *, length: int = _SNIPPET_LETTERS) -> str:
    """The sentence that shares most words with the query and what follows it, at most `length` letters; else the start.

    >>> snippet("Opens a file. The archive's members are listed by name. Closes it.", "list members", length=40)
    "… The archive's members are listed by …"
    """
    wanted = _wanted(query)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
    best = max(range(len(sentences)), key=lambda n: (len(wanted & _stems(sentences[n])), -n), default=0)
    shown = plain(" ".join(sentences[best:]))
    shown = f"… {shown}" if best else shown
    if len(shown) <= length:
        return shown
    cut = shown[: length - 2]
    return f"{cut.rpartition(' ')[0] or cut} …"


def highlights(text: str, query: str) -> list[tuple[int, int]]:
    """Where the text has words of the query or forms of them, as the full-text index sees them: (start, stop).

    >>> highlights("infers how infer_compression works", "inferring")
    [(0, 6), (11, 28)]
    """
    wanted = _wanted(query)
    return [word.span() for word in _WORD.finditer(text) if wanted & _stems(word[0])]


def highlighted(text: str, query: str) -> Text:
    """The text with the query's words in bold."""
    shown = Text(text)
    for span in highlights(text, query):
        shown.stylize("bold", *span)
    return shown


def plain(text: str) -> str:
    """One line without control, formatting or undecodable characters.

    >>> plain("two\\n lines, \\x1b[31mred\\x1b[0m and \\u202ebackwards")
    'two lines, [31mred[0m and backwards'
    """
    visible = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(visible.split())


def _wanted(query: str) -> frozenset[str]:
    return frozenset(terms(query)[0])


def _stems(text: str) -> frozenset[str]:
    return frozenset(words().analyze(spelled_out(text)))
