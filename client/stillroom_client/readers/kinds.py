"""Which reader a file goes to: by the end of its name; without one that is known, by what it begins with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import PurePath

from stillroom_client.readers.blocks import Reading, UnreadableError
from stillroom_client.readers.code import LANGUAGES

VERSION = "1"  # of all readers together: another one reads every file again

_SUFFIXES = {
    **dict.fromkeys(LANGUAGES, "code"),
    **dict.fromkeys(
        ("txt", "text", "rst", "org", "adoc", "asciidoc", "tex", "log", "nfo", "csv", "tsv", "srt"), "text"
    ),
    **dict.fromkeys(("toml", "ini", "cfg", "conf", "yaml", "yml", "json", "xml", "diff", "patch"), "text"),
    **dict.fromkeys(("md", "markdown", "mdown", "mkd", "qmd", "rmd"), "markdown"),
    **dict.fromkeys(("html", "htm", "xhtml"), "html"),
    "pdf": "pdf",
    "docx": "docx",
    "eml": "email",
}
_NEEDS = {
    "pdf": ("pypdfium2", "pypdfium2"),
    "docx": ("docx", "python-docx"),
    "markdown": ("markdown_it", "markdown-it-py"),
}
_MODULES = {"text": "plain", "email": "mail"}
_DEPTH = 3  # a mail in a mail in a mail


def known(name: str) -> bool:
    """Whether the end of a file's name says what it is."""
    return PurePath(name).suffix[1:].lower() in _SUFFIXES


def kind(name: str, content: bytes) -> str:
    """The type of a document. A text is the guess for a name that says nothing; its reader refuses what is binary."""
    if named := _SUFFIXES.get(PurePath(name).suffix[1:].lower()):
        return named
    if content.startswith(b"%PDF-"):
        return "pdf"
    start = content[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    return "text"


def read(name: str, content: bytes, depth: int = 0) -> Reading:
    """Read a document.

    Raises:
        UnreadableError: it is broken, locked or binary, or its parser is not installed.
    """
    found = kind(name, content)
    needed, package = _NEEDS.get(found, ("", ""))
    try:
        if needed:
            import_module(needed)
        reader: Callable[..., Reading] = import_module(f"stillroom_client.readers.{_MODULES.get(found, found)}").read
    except ImportError as error:
        raise UnreadableError(f"needs a parser that is not installed ({error.name}): pip install {package}") from None
    if found == "email" and depth < _DEPTH:
        return reader(name, content, partial(read, depth=depth + 1))
    return reader(name, content)
