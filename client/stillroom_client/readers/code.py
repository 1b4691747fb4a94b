"""Source code: functions, methods and classes, each below the names that enclose it.

Python is read by its own parser; a file that it refuses, and every other language, by lines that declare something: the
declaration and all up to the next one are a block, comments directly above it included. That needs no grammar, and a
declaration that is missed costs a title, never text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from stillroom_client.readers.blocks import LIMIT, Block, Lines, Reading, pieces
from stillroom_client.readers.decoding import decoded
from stillroom_client.readers.plain import odd

LANGUAGES = {
    "bash": "shell", "c": "c", "cc": "c++", "cpp": "c++", "cs": "c#", "css": "css", "cu": "cuda", "cxx": "c++",
    "clj": "clojure", "dart": "dart", "ex": "elixir", "exs": "elixir", "erl": "erlang", "f90": "fortran", "fs": "f#",
    "go": "go", "groovy": "groovy", "h": "c", "hpp": "c++", "hs": "haskell", "java": "java", "jl": "julia",
    "js": "javascript", "jsx": "javascript", "kt": "kotlin", "lua": "lua", "m": "objective-c", "mjs": "javascript",
    "ml": "ocaml", "nim": "nim", "php": "php", "pl": "perl", "pm": "perl", "proto": "protobuf", "ps1": "powershell",
    "py": "python", "pyi": "python", "pyx": "cython", "r": "r", "rb": "ruby", "rs": "rust", "scala": "scala",
    "scss": "css", "sh": "shell", "sql": "sql", "swift": "swift", "ts": "typescript", "tsx": "typescript",
    "vue": "vue", "zig": "zig", "zsh": "shell",
}  # fmt: skip
_WORDS = [
    "function",
    "func",
    "fun",
    "fn",
    "def",
    "defp",
    "defmodule",
    "class",
    "struct",
    "enum",
    "interface",
    "trait",
    "impl",
    "module",
    "namespace",
    "type",
    "union",
    "protocol",
    "extension",
    "object",
    "record",
    "sub",
    "proc",
    "procedure",
    "package",
    "message",
    "service",
]
_DECLARED = re.compile(
    r"^(?P<indent>[ \t]*)(?:[\w\])(@\[.]+[ \t]+){0,5}?(?:" + "|".join(_WORDS) + r")\*?(?:<[^>\n]*>)?[ \t]+"
    r"(?:\([^)\n]*\)[ \t]*)?(?P<name>[A-Za-z_$][\w$:.]*)|"
    r"^(?P<indent2>[ \t]*)CREATE\s+(?:OR\s+REPLACE\s+)?\w+\s+(?P<name2>[\w.\"]+)|"
    r"^(?P<indent3>[ \t]{0,4})(?!return|else|if|for|while|switch|case|throw|new|await)[A-Za-z_][\w:<>,*&\[\] \t]*?[ \t*&]"
    r"(?P<name3>~?[A-Za-z_]\w*(?:::~?\w+)*)[ \t]*\([^;{}\n]*(?:\)[^;\n]*\{?|,)[ \t]*$|"
    r"^(?P<indent4>[ \t]*)(?P<name4>[A-Za-z_][\w-]*)[ \t]*\(\)[ \t]*\{|"
    r"^(?P<indent5>[ \t]*)(?:export[ \t]+)?(?:const|let|var)[ \t]+(?P<name5>[\w$]+)[ \t]*=[^\n]{0,200}=>",
    re.IGNORECASE,
)
_LEADING = re.compile(r"[ \t]*(?://|#|/\*|\*|--|;;|@|\"\"\"|%)")
_TAB = 4


def read(name: str, content: bytes) -> Reading:
    """The blocks of a source file: `language`, and the `symbol` of each block that has one."""
    text, encoding = decoded(content)
    language = LANGUAGES.get(name.rpartition(".")[2].lower(), "text")
    said = odd(encoding)
    blocks: tuple[Block, ...] | None = None
    if language == "python":
        blocks = _python(name, text)
    if blocks is None:
        blocks = tuple(_declarations(name, text))
    return Reading("code", blocks, "", {"language": language, **said.metadata}, said.notes)


def _python(name: str, text: str) -> tuple[Block, ...] | None:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    lines = Lines(text)
    return tuple(_body(tree.body, 1, text.count("\n") + 2, (), name, text, lines))


def _body(
    nodes: list[ast.stmt], first: int, last: int, symbols: tuple[str, ...], name: str, text: str, lines: Lines
) -> Iterator[Block]:
    """The lines `first` to `last` (exclusive) of a module or class: its definitions, and what stands between them."""
    line = first
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        while begin > line and text[lines.start(begin - 1) : lines.start(begin)].lstrip().startswith("#"):
            begin -= 1
        end = (node.end_lineno or node.lineno) + 1
        if begin < line:  # two on one line
            continue
        yield from _block(text, line, begin, symbols, name, lines)
        inner = (*symbols, node.name)
        whole = lines.start(end) - lines.start(begin)
        if isinstance(node, ast.ClassDef) and whole > LIMIT:
            yield from _body(node.body, begin, end, inner, name, text, lines)
        else:
            yield from _block(text, begin, end, inner, name, lines)
        line = end
    yield from _block(text, line, last, symbols, name, lines)


def _declarations(name: str, text: str) -> Iterator[Block]:
    lines, rows = Lines(text), text.split("\n")
    begin = 0
    path: list[tuple[int, str]] = []  # (indentation, name)
    for number, row in enumerate(rows):
        found = _DECLARED.match(row) if len(row) < 400 else None
        if found is None or _LEADING.match(row):
            continue
        head = number
        while head > begin and rows[head - 1].strip() and _LEADING.match(rows[head - 1]):
            head -= 1
        yield from _block(text, begin + 1, head + 1, tuple(symbol for _, symbol in path), name, lines)
        begin = head
        indent = len(row.expandtabs(_TAB)) - len(row.expandtabs(_TAB).lstrip())
        symbol = next(found[group] for group in ("name", "name2", "name3", "name4", "name5") if found[group])
        path = [item for item in path if item[0] < indent] + [(indent, symbol)]
    yield from _block(text, begin + 1, len(rows) + 1, tuple(symbol for _, symbol in path), name, lines)


def _block(text: str, first: int, last: int, symbols: tuple[str, ...], name: str, lines: Lines) -> Iterator[Block]:
    metadata = {"symbol": ".".join(symbols)} if symbols else {}
    headings = (name, ".".join(symbols)) if symbols else (name,)
    yield from pieces(text, lines.start(first), lines.start(last), headings=headings, lines=lines, metadata=metadata)
