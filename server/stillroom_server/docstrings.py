"""The default corpus: docstrings of the Python packages that are installed beside Stillroom.

The summary line is the query, the body the passage, the top-level package the owner (DESIGN section 8). Source files are
parsed, never imported. Deterministic for given package versions; the list of packages is fixed, so that an added
dependency does not change the corpus.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stillroom_shared.corpus import Corpus, Passage, Query, normalize, split_of
from stillroom_shared.errors import DataError

STANDARD_LIBRARY = "python"
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo", "__pycache__"}
    | {"externals", "_external", "_vendor", "vendor", "_vendored"}
)
_QUERY_WORDS = range(3, 33)
_MINIMUM_PASSAGE_WORDS = 12


@dataclass(frozen=True, kw_only=True)
class DocstringSource:
    """Which packages are public text and which are private, by import name; `python` is the standard library."""

    name: str
    public: tuple[str, ...]
    private: tuple[str, ...]


FULL = DocstringSource(
    name="docstrings-full",
    public=(STANDARD_LIBRARY, "torch", "transformers", "huggingface_hub"),
    private=(
        "absl", "dp_accounting", "flwr", "fsspec", "mpmath", "networkx", "numpy", "opacus",
        "pydantic", "scipy", "sentence_transformers", "sklearn", "sqlalchemy", "sympy",
    ),
)  # fmt: skip
SMALL = DocstringSource(
    name="docstrings-small",
    public=(STANDARD_LIBRARY,),
    private=("flwr", "fsspec", "networkx", "pydantic"),
)


def docstring_corpus(
    source: DocstringSource, *, workers: int = 2, progress: Callable[[int, int], None] = lambda done, total: None
) -> Corpus:
    """Extract the corpus; `progress(done, total)` counts source files.

    Queries and bodies that repeat an earlier one (public packages first, then alphabetical order) are dropped, so no
    private query has a public twin.
    """
    files = [(owner, path, root) for owner in (*source.public, *source.private) for path, root in _source_files(owner)]
    passages: list[Passage] = []
    queries: list[Query] = []
    qrels: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    with ProcessPoolExecutor(workers) as pool:
        for done, pairs in enumerate(pool.map(_pairs_of_file, files, chunksize=32), start=1):
            progress(done, len(files))
            for owner, place, summary, body in pairs:
                keys = {normalize(summary), normalize(body)}
                if keys & seen:
                    continue
                seen |= keys
                # The place alone is not unique: conditional definitions repeat it.
                key = f"{place}#{hashlib.sha256(summary.encode()).hexdigest()[:8]}"
                passages.append(Passage(key, owner, body))
                queries.append(Query(f"q:{key}", owner, summary, split_of(summary)))
                qrels[f"q:{key}"] = {key: 1}
    return Corpus(source.name, tuple(passages), tuple(queries), qrels)


def package_files(owner: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of an installed package by their suffixes, sorted, without tests and vendored packages.

    Raises `DataError` when the package is not installed.
    """
    root = _root_of(owner)
    for path in sorted(root.rglob("*")):
        if path.suffix in suffixes and not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            yield path


def _source_files(owner: str) -> Iterator[tuple[Path, Path]]:
    root = _root_of(owner)
    return ((path, root.parent) for path in package_files(owner, (".py",)))


def _root_of(owner: str) -> Path:
    if owner == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(owner)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"package {owner!r} of the docstring corpus is not installed: pip install 'stillroom[federated,server,offline]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _pairs_of_file(job: tuple[str, Path, Path]) -> list[tuple[str, str, str, str]]:
    """(owner, qualified place, summary, body) for each usable docstring of one file, in source order."""
    owner, path, root = job
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # templates and fixtures for other encodings or versions: not Python that could be documented
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    return [(owner, place, *pair) for place, text in _docstrings(tree, module) if (pair := _split(text))]


def _docstrings(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield place, text
        for child in node.body:
            name = getattr(child, "name", "")
            yield from _docstrings(child, f"{place}.{name}" if name else place)


def _split(docstring: str) -> tuple[str, str] | None:
    summary, _, body = docstring.partition("\n\n")
    summary, body = " ".join(summary.split()), body.strip()
    if len(summary.split()) not in _QUERY_WORDS or len(body.split()) < _MINIMUM_PASSAGE_WORDS:
        return None
    try:
        docstring.encode()
    except UnicodeEncodeError:
        return None  # an escape in the source made half a surrogate pair, which no file and no hash can hold
    return summary, body
