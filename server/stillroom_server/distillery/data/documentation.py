"""Installed documentation as passages: what packages ship beside their docstrings.

| what | where | title of a section |
|---|---|---|
| long descriptions | METADATA of the installed distribution | its headings |
| .rst, .md and .txt files | inside the package, without tests and licences | their headings |
| long texts in the code | string literals of 40 words or more that are no docstrings, as help texts | none |

The packages are named, as for docstrings, so that an added dependency does not change the corpus. Files are parsed, never
imported; the standard library's language reference (`pydoc_data`) is found as literals. A section is cut into passages of whole
paragraphs. Order: packages as named, then files and positions.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from stillroom_server.docstrings import STANDARD_LIBRARY, package_files
from stillroom_shared.corpus import normalize

_SUFFIXES = (".rst", ".md", ".txt")
_NOT_PROSE = re.compile("licen[cs]e|copying|authors|notice|requirements|top_level|entry_points|sources|template", re.I)
_LITERAL_WORDS = 40
_SHORTEST = 12
_PASSAGE_WORDS = 200
_LETTERS = 0.55
_MARKDOWN = re.compile(r"#{1,6} +(?P<title>\S.*?) *#*$")
_UNDERLINE = re.compile(r"([=\-~^\"'`*+#.:_])\1{2,}\s*$")


def sections(
    packages: Iterable[str], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[str]:
    """Passages of each package's documentation, "title\\ntext" where there is a title, each once.

    `progress(done, total)` counts files. Raises `DataError` when a package is not installed.
    """
    jobs: list[tuple[str, Path | None]] = []
    for package in packages:
        jobs.append((package, None))
        jobs += [(package, path) for path in package_files(package, (".py", *_SUFFIXES))]
    seen: set[str] = set()
    for done, (package, path) in enumerate(jobs, start=1):
        for title, text in _read(package, path):
            for passage in passages(title, text):
                if (key := normalize(passage)) not in seen:
                    seen.add(key)
                    yield passage
        progress(done, len(jobs))


def passages(title: str, text: str) -> Iterator[str]:
    """Whole paragraphs of a section together up to 200 words; what is short or mostly no letters is left out.

    >>> body = " ".join(["The tapir eats leaves at night."] * 3)
    >>> list(passages("Tapirs", body)) == [f"Tapirs\\n{body}"], list(passages("", "x = (1 + 2) * 3 - 4 / 5 ** 6"))
    (True, [])
    """
    waiting: list[str] = []
    paragraphs = re.split(r"\n\s*\n", text)
    for number, paragraph in enumerate(paragraphs, start=1):
        waiting.append(paragraph.strip("\n"))
        words = sum(len(one.split()) for one in waiting)
        following = len(paragraphs[number].split()) if number < len(paragraphs) else _PASSAGE_WORDS
        if words + following > _PASSAGE_WORDS:
            body = "\n\n".join(waiting).strip()
            waiting = []
            if words >= _SHORTEST and _is_prose(body):
                yield f"{title}\n{body}" if title else body


def headed(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text below it) of Markdown or reStructuredText; "" before the first heading.

    >>> list(headed("Zoo\\n===\\nAll animals.\\n\\n## Tapirs\\nThey eat."))
    [('Zoo', 'All animals.\\n'), ('Tapirs', 'They eat.')]
    """
    title, lines = "", text.split("\n")
    body: list[str] = []
    fenced = False
    for line, following in pairwise([*lines, ""]):
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced ^= fence
        found = None if fenced else _MARKDOWN.match(line)
        underlined = not fenced and line.strip() and not _UNDERLINE.match(line) and _UNDERLINE.match(following)
        if found or (underlined and len(following.strip()) >= len(line.strip())):
            if "\n".join(body).strip():
                yield title, "\n".join(body)
            title, body = found["title"] if found else line.strip(), []
        elif fenced or fence or not _UNDERLINE.match(line):
            body.append(line)
    if "\n".join(body).strip():
        yield title, "\n".join(body)


def _read(package: str, path: Path | None) -> Iterator[tuple[str, str]]:
    """(title, text) of one file, or of the package's long description when there is no path."""
    if path is None:
        names = importlib.metadata.packages_distributions().get(package, ()) if package != STANDARD_LIBRARY else ()
        for name in names:
            yield from headed(_description(name))
        return
    if path.suffix != ".py" and _NOT_PROSE.search(path.name):
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # fixtures for other encodings
    if path.suffix == ".py":
        yield from (("", literal) for literal in _literals(text))
    else:
        yield from headed(text)


def _description(distribution: str) -> str:
    """What stands below the headers of METADATA: the long description."""
    text = importlib.metadata.distribution(distribution).read_text("METADATA") or ""
    return text.partition("\n\n")[2]


def _literals(source: str) -> Iterator[str]:
    """String literals of some length that are no docstrings, in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if len(node.value.split()) >= _LITERAL_WORDS and _is_prose(node.value):
            yield node.value


def _is_prose(text: str) -> bool:
    """Mostly letters among what is no white space, and text that a file can hold."""
    shown = [letter for letter in text if not letter.isspace()]
    if any("\ud800" <= letter <= "\udfff" for letter in shown):
        return False
    return sum(map(str.isalpha, shown)) > _LETTERS * len(shown)
