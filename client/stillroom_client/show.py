"""What search results look like on a terminal.

Documents are untrusted text: nothing in them is read as markup, and no control or invisible formatting character of
theirs reaches the terminal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from stillroom_client.device import Hit

_WORD = re.compile(r"\w+")
_STEM = 5  # letters that words share when one is a form of the other: "listing", "listed"
_COMMON = frozenset(
    ("and", "are", "can", "does", "for", "from", "how", "its", "not", "that", "the", "this", "what", "with")
)
_SNIPPET_LETTERS = 180


def hits_table(hits: Sequence[Hit], query: str) -> Table:
    """Rank, score, owner, passage and the most relevant sentence of each hit."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="dim")
    table.add_column("#", justify="right", style="dim")
    table.add_column("score", justify="right")
    table.add_column("owner", overflow="fold", max_width=16)
    table.add_column("passage", overflow="fold", max_width=36, style="cyan")
    table.add_column("text", overflow="fold")
    for hit in hits:
        found = highlighted(snippet(hit.text, query), query)
        if title := plain(hit.title):
            found = Text.assemble((title, "bold"), "\n", found)
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(plain(hit.owner)), Text(plain(hit.passage_id)), found)
    return table


def snippet(text: str, query: str, *, length: int = _SNIPPET_LETTERS) -> str:
    """The sentence that shares most words with the query and what follows it, at most `length` letters; else the start.

    >>> snippet("Opens a file. The archive's members are listed by name. Closes it.", "list members", length=40)
    "… The archive's members are listed by …"
    """
    wanted = _stems(query)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
    best = max(range(len(sentences)), key=lambda n: (len(wanted & _stems(sentences[n])), -n), default=0)
    shown = plain(" ".join(sentences[best:]))
    shown = f"… {shown}" if best else shown
    if len(shown) <= length:
        return shown
    cut = shown[: length - 2]
    return f"{cut.rpartition(' ')[0] or cut} …"


def highlighted(text: str, query: str) -> Text:
    """The text with the query's words in bold."""
    wanted, shown = _stems(query), Text(text)
    for word in _WORD.finditer(text):
        if _stem(word[0]) in wanted:
            shown.stylize("bold", *word.span())
    return shown


def plain(text: str) -> str:
    """One line without control, formatting or undecodable characters.

    >>> plain("two\\n lines, \\x1b[31mred\\x1b[0m and \\u202ebackwards")
    'two lines, [31mred[0m and backwards'
    """
    visible = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(visible.split())


def _stems(text: str) -> set[str]:
    return {stem for word in _WORD.findall(text) if (stem := _stem(word))}


def _stem(word: str) -> str:
    """The start of a word that says something; "" for one that does not."""
    folded = word.casefold()
    return folded[:_STEM] if len(folded) > 2 and folded not in _COMMON else ""
