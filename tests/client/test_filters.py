"""A filter finds what a slow, obvious reading of it finds, and what is none is refused with its place."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom_client.filters import DEEPEST, MOST_CHARACTERS, FilterError, compile_filter

Row = dict[str, Any]
FIELDS = {"type": "p.type", "year": "p.year", "note": "p.note"}
ROWS: list[Row] = [
    {"type": kind, "year": year, "note": note}
    for kind in ("pdf", "PDF", "it's", "", None)
    for year in (1999, 2020, 2020.5, None)
    for note in ("a b", 2020, "2020", None)
]


def database() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE passages (row INTEGER PRIMARY KEY, type TEXT, year NUMERIC, note)")
    db.executemany("INSERT INTO passages (type, year, note) VALUES (:type, :year, :note)", ROWS)
    return db


DB = database()


def found(text: str) -> list[int]:
    condition = compile_filter(text, FIELDS.get)
    query = f"SELECT row - 1 FROM passages p WHERE {condition.sql} ORDER BY row"
    return [row[0] for row in DB.execute(query, condition.values)]


def same_kind(value: object, other: object) -> bool:
    return value is not None and isinstance(value, str) == isinstance(other, str)


MEANING: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda have, value: same_kind(have, value) and have == value,
    "!=": lambda have, value: have is not None and not (same_kind(have, value) and have == value),
    "<": lambda have, value: same_kind(have, value) and have < value,
    "<=": lambda have, value: same_kind(have, value) and have <= value,
    ">": lambda have, value: same_kind(have, value) and have > value,
    ">=": lambda have, value: same_kind(have, value) and have >= value,
}
values = st.sampled_from([1999, 2020, 2020.5, "pdf", "PDF", "it's", "", "a b", "2020", "and", 'say "x"', "é"])


def spelled(value: object) -> str:
    return str(value) if not isinstance(value, str) else "'" + value.replace("'", "''") + "'"


Expression = tuple[str, Callable[[Row], bool]]


def comparisons() -> st.SearchStrategy[Expression]:
    def one(name: str, operator: str, value: Any) -> Expression:
        return f"{name} {operator} {spelled(value)}", lambda row: MEANING[operator](row[name], value)

    def among(name: str, listed: list[Any], negated: bool) -> Expression:
        text = f"{name} {'NOT ' if negated else ''}in ({', '.join(map(spelled, listed))})"
        equal = MEANING["="]
        if negated:
            return text, lambda row: row[name] is not None and not any(equal(row[name], value) for value in listed)
        return text, lambda row: any(equal(row[name], value) for value in listed)

    names = st.sampled_from(sorted(FIELDS))
    return st.builds(one, names, st.sampled_from(sorted(MEANING)), values) | st.builds(
        among, names, st.lists(values, min_size=1, max_size=4), st.booleans()
    )


def larger(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    def both(a: Expression, b: Expression) -> Expression:
        return f"({a[0]}) and ({b[0]})", lambda row: a[1](row) and b[1](row)

    def either(a: Expression, b: Expression, c: Expression) -> Expression:  # without parentheses: `and` binds tighter
        return f"({a[0]}) OR ({b[0]}) and ({c[0]})", lambda row: a[1](row) or (b[1](row) and c[1](row))

    def negated(a: Expression) -> Expression:
        return f"not ({a[0]})", lambda row: not a[1](row)

    return st.builds(both, inner, inner) | st.builds(either, inner, inner, inner) | st.builds(negated, inner)


@settings(max_examples=300, deadline=None)
@given(st.recursive(comparisons(), larger, max_leaves=8))
def test_sql_finds_what_the_expression_says(expression: Expression) -> None:
    """Guards against NULL that is neither true nor false, affinity that turns '2020' into 2020, and wrong precedence."""
    text, holds = expression
    assert found(text) == [place for place, row in enumerate(ROWS) if holds(row)]


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="ab=<>!()'\", nortyeiNOT12.\x00\ud800", max_size=40))
def test_every_text_is_a_filter_or_an_error_that_shows_its_place(text: str) -> None:
    """Guards against a traceback, an endless loop, or an error of SQLite, from anything that can be typed."""
    try:
        found(text)
    except FilterError as error:
        message, shown, mark = str(error).rsplit("\n", 2)
        assert message and mark.strip() == "^" and shown.startswith("  ") and "\n" not in message


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("", "ends where a field is expected", 0),
        ("year>=2020 and", "ends where a field is expected", 14),
        ("year", "ends where one of = != < <= > >= or `in` is expected", 4),
        ("year>=", "ends where a value is expected", 6),
        ("year==2020", "a value is expected", 5),
        ("colour=red", "there is no field 'colour'", 0),
        ("year=2020 type=pdf", "`and`, `or` or the end is expected", 10),
        ("(year=2020", "ends where `)` is expected", 10),
        ("year=2020)", "`and`, `or` or the end is expected", 9),
        ("type='pdf", "a quote ' is never closed", 5),
        ("type in pdf", "`(` is expected", 8),
        ("type in ()", "a value is expected", 9),
        ("type not like x", "`in` is expected", 9),
        ("type=pdf; DROP", "';' has no meaning here", 8),
        ("'type'=pdf", "a field is expected", 0),
        ("year in (1,,2)", "a value is expected", 11),
    ],
)
def test_an_error_shows_its_place(text: str, message: str, place: int) -> None:
    """Guards against "syntax error", which leaves the owner to find it himself."""
    with pytest.raises(FilterError) as error:
        compile_filter(text, FIELDS.get)
    first, shown, mark = str(error.value).split("\n")
    assert message in first and shown == f"  {text}" and mark == f"  {' ' * place}^"


def test_the_mark_stands_below_its_character() -> None:
    """Guards against a mark that wide characters push aside, and line breaks or escapes that reach the terminal."""
    with pytest.raises(FilterError) as error:
        compile_filter("type='漢字' \x1b\n year", FIELDS.get)
    assert str(error.value).split("\n")[1:] == ["  type='漢字'    year", "  " + " " * 12 + "^"]


def test_long_and_deep_filters_end_in_an_answer() -> None:
    """Guards against a RecursionError here, and against SQLite's limit on the depth of an expression."""
    assert found("year in (" + ",".join(["1999"] * 700) + ")") == found("year=1999")
    assert found(" or ".join(["year=1999"] * 300)) == found("year=1999")
    assert found("(" * DEEPEST + "year=1999" + ")" * DEEPEST) == found("year=1999")
    for text in ("(" * 2000, "not " * 900 + "year=1", "(" * (DEEPEST + 1) + "year=1", "not (" * 500 + "year=1"):
        with pytest.raises(FilterError, match=f"{DEEPEST} levels"):
            compile_filter(text, FIELDS.get)
    with pytest.raises(FilterError, match="characters"):
        compile_filter("x" * (MOST_CHARACTERS + 1), FIELDS.get)


def test_values_never_become_sql() -> None:
    """Guards against a quoted value that ends its own string."""
    assert (
        found("type = 'it''s'") == found('type = "it\'s"') == [n for n, row in enumerate(ROWS) if row["type"] == "it's"]
    )
    evil = "x' OR 1=1 --"
    condition = compile_filter(f'type = "{evil}"', FIELDS.get)
    assert condition.values == (evil,) and evil not in condition.sql and found(f'type = "{evil}"') == []
