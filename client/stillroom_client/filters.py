"""Filters on what is known of a passage: `type=pdf and year>=2020`. A small language of its own, compiled to SQL.

    expression = both { "or" both }
    both       = one { "and" one }
    one        = "not" one | "(" expression ")" | field comparison
    comparison = ("=" | "!=" | "<" | "<=" | ">" | ">=") value  |  ["not"] "in" "(" value { "," value } ")"
    value      = number | word | quoted string; "" or '' around what has blanks, a quote inside is doubled

Words of the language are read in any case. A word is letters, digits and `_ . - / : @ + * ~ % # $ \\ &`.

| a comparison | is |
|---|---|
| of numbers, or of texts | by size; by code points, case counts |
| of a number with a text | false; `page='7'` finds no page number 7 |
| of a field that the passage does not have | false, `!=` and `not in` too; so `not year=2020` finds what has no year |

Every text is an expression or a `FilterError` that shows the place. Values reach SQLite as parameters only, and names of
fields only through `Fields`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from rich.cells import cell_len

from stillroom_shared.errors import SettingsError

Value = str | int | float
Fields = Callable[[str], str | None]
"""From the name of a field to its SQL expression over the passage `p`; None when there is no such field."""

MOST_CHARACTERS = 4_000
DEEPEST = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<op>!=|<=|>=|=|<|>|\(|\)|,)|(?P<quoted>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")|(?P<word>[\w.\-/:@+*~%#$\\&]+))"
)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_COMPARISONS = ("=", "!=", "<", "<=", ">", ">=")
_KEYWORDS = ("and", "or", "not", "in")


class FilterError(SettingsError):
    """A filter that cannot be read; the message shows where, and `place` counts the characters before it."""

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, slots=True)
class Condition:
    """A filter in SQL over the passage `p`, with the values of its parameters.

    >>> compile_filter("year>=2020 or owner in (zoo, 'city museum')", {"owner": "p.owner", "year": "p.year"}.get)
    ... # doctest: +NORMALIZE_WHITESPACE
    Condition(sql="((typeof(p.year) IN ('integer', 'real') AND p.year >= ?)
               OR ((typeof(p.owner) = 'text' AND p.owner = ?) OR (typeof(p.owner) = 'text' AND p.owner = ?)))",
              values=(2020, 'zoo', 'city museum'))
    >>> compile_filter("year>=2020 and", {"year": "p.year"}.get)
    Traceback (most recent call last):
        ...
    stillroom_client.filters.FilterError: the filter ends where a field is expected
      year>=2020 and
                    ^
    """

    sql: str
    values: tuple[Value, ...]


def compile_filter(text: str, fields: Fields) -> Condition:
    """Read a filter. Raises `FilterError`, and nothing else, for any text that is none."""
    if len(text) > MOST_CHARACTERS:
        raise FilterError(f"the filter has {len(text):,} characters: {MOST_CHARACTERS:,} are read")
    parser = _Parser(text, fields)
    sql = parser.expression(0)
    if parser.kind:
        parser.fail("`and`, `or` or the end is expected")
    return Condition(sql, tuple(parser.values))


@dataclass
class _Parser:
    """One token ahead: `kind` is "op", "quoted", "word", "bad" or "" at the end."""

    text: str
    fields: Fields
    values: list[Value] = field(default_factory=list)
    start: int = 0
    stop: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        self.text = self.text.encode(errors="replace").decode()  # half a surrogate pair is no text to SQLite
        self._next()

    def expression(self, depth: int) -> str:
        if depth > DEEPEST:
            self.fail(f"{DEEPEST} levels of parentheses and `not` are the most that is read")
        found = [self._both(depth)]
        while self._takes("or"):
            found.append(self._both(depth))
        return _joined(" OR ", found)

    def _both(self, depth: int) -> str:
        found = [self._one(depth)]
        while self._takes("and"):
            found.append(self._one(depth))
        return _joined(" AND ", found)

    def _one(self, depth: int) -> str:
        if self._takes("not"):
            if depth >= DEEPEST:
                self.fail(f"{DEEPEST} levels of parentheses and `not` are the most that is read")
            return f"(NOT {self._one(depth + 1)})"
        if self._takes("("):
            inner = self.expression(depth + 1)
            self._expect(")")
            return inner
        if self.kind != "word" or self._said in _KEYWORDS:
            self.fail("a field is expected")
        name = self._token
        column = self.fields(name)
        if column is None:
            self.fail(f"there is no field {name!r}")
        self._next()
        return self._comparison(column)

    def _comparison(self, column: str) -> str:
        if self.kind == "op" and (operator := self._token) in _COMPARISONS:
            self._next()
            return self._compared(column, operator)
        absent = self._takes("not")
        if not self._takes("in"):
            self.fail("`in` is expected" if absent else f"one of {' '.join(_COMPARISONS)} or `in` is expected")
        self._expect("(")
        found = [self._compared(column, "=")]
        while self._takes(","):
            found.append(self._compared(column, "="))
        self._expect(")")
        listed = _joined(" OR ", found)
        return f"({column} IS NOT NULL AND NOT {listed})" if absent else listed

    def _compared(self, column: str, operator: str) -> str:
        value = self._value()
        self.values.append(value)
        typed = "= 'text'" if isinstance(value, str) else "IN ('integer', 'real')"
        if operator == "!=":  # another kind of value differs too
            return f"({column} IS NOT NULL AND NOT (typeof({column}) {typed} AND {column} = ?))"
        return f"(typeof({column}) {typed} AND {column} {operator} ?)"

    def _value(self) -> Value:
        token, kind = self._token, self.kind
        if kind not in ("quoted", "word") or (kind == "word" and self._said in _KEYWORDS):
            self.fail("a value is expected")
        self._next()
        if kind == "quoted":
            return token[1:-1].replace(token[0] * 2, token[0])
        if not _NUMBER.fullmatch(token):
            return token
        number = float(token)
        whole = int(token) if re.fullmatch(r"[+-]?\d{1,18}", token, re.ASCII) else None
        return number if whole is None else whole

    @property
    def _token(self) -> str:
        return self.text[self.start : self.stop]

    @property
    def _said(self) -> str:
        return self._token.lower()

    def _takes(self, wanted: str) -> bool:
        if self.kind in ("op", "word") and self._said == wanted:
            self._next()
            return True
        return False

    def _expect(self, wanted: str) -> None:
        if not self._takes(wanted):
            self.fail(f"`{wanted}` is expected")

    def _next(self) -> None:
        found = _TOKEN.match(self.text, self.stop)
        if found and found.lastgroup:
            self.kind, (self.start, self.stop) = found.lastgroup, found.span(found.lastgroup)
            return
        self.start = len(self.text) - len(self.text[self.stop :].lstrip())
        self.kind = "bad" if self.start < len(self.text) else ""
        self.stop = len(self.text)

    def fail(self, expected: str) -> NoReturn:
        """Raise, with the place."""
        found = "the filter ends where " if not self.kind else ""
        if self.kind == "bad":
            quote = self.text[self.start]
            expected = (
                f"a quote {quote} is never closed" if quote in "'\"" else f"{quote!r} has no meaning here: quote it"
            )
        before, after = _shown(self.text[: self.start]), _shown(self.text[self.start :])
        raise FilterError(f"{found}{expected}\n  {before}{after}\n  {' ' * cell_len(before)}^", self.start)


def _shown(text: str) -> str:
    return "".join(" " if c.isspace() or not c.isprintable() else c for c in text)


def _joined(operator: str, parts: list[str]) -> str:
    """In halves, because SQLite reads a thousand levels, and a chain of n is n deep."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return f"({_joined(operator, parts[:half])}{operator}{_joined(operator, parts[half:])})"
