"""Where a run's text comes from: the docstrings of this machine, or a BEIR-layout folder; kept in the run's cache."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from stillroom_server.docstrings import FULL, SMALL, DocstringSource, docstring_corpus
from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import Corpus, Passage, Query
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings import CorpusSettings
from stillroom_shared.workspace import key_of

_SOURCES = {"small": SMALL, "full": FULL}
Progress = Callable[[int, int], None]


def load_corpus(
    settings: CorpusSettings, *, cache: Path, workers: int, progress: Progress = lambda done, total: None
) -> tuple[Corpus, Corpus]:
    """The public and the private corpus. Docstrings are read from the cache while no package has changed.

    A run that starts from another's release distils nothing, so its public side may be empty.
    """
    if settings.data is not None:
        corpus = load_beir(settings.data, progress=progress)
        if settings.start_from is not None and not settings.public_owners:
            return corpus.restrict(lambda owner: False), corpus
        if not settings.public_owners:
            raise SettingsError(
                f"corpus.public_owners is empty: say which owners of {settings.data} are public text for distillation, "
                f"e.g. --set corpus.public_owners={corpus.owners[0]}; its owners are {', '.join(corpus.owners[:12])}"
            )
        return corpus.require_both_sides(settings.public_owners)
    source = _SOURCES[settings.scale]
    path = cache / "corpus" / f"{source.name}-{_installed(source)}.json"
    if path.exists():
        corpus = _read(path)
    else:
        corpus = docstring_corpus(source, workers=workers, progress=progress)
        _write(corpus, path)
    return corpus.require_both_sides(settings.public_owners or source.public)


def _installed(source: DocstringSource) -> str:
    """Changes when Python, a package of the source, or the source itself does."""
    distributions = importlib.metadata.packages_distributions()
    names = {name for owner in (*source.public, *source.private) for name in distributions.get(owner, ())}
    return key_of(asdict(source), platform.python_version(), {n: importlib.metadata.version(n) for n in sorted(names)})


def _write(corpus: Corpus, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = {
        "name": corpus.name,
        "passages": [[p.id, p.owner, p.text, p.title] for p in corpus.passages],
        "queries": [[q.id, q.owner, q.text, q.split] for q in corpus.queries],
        "qrels": {query: dict(grades) for query, grades in corpus.qrels.items()},
        "hash": corpus.content_hash,
    }
    partial.write_text(json.dumps(content))
    partial.replace(path)


def _read(path: Path) -> Corpus:
    content = json.loads(path.read_text())
    corpus = Corpus(
        content["name"],
        tuple(Passage(*fields) for fields in content["passages"]),
        tuple(Query(*fields) for fields in content["queries"]),
        content["qrels"],
    )
    if corpus.content_hash != content["hash"]:
        raise SettingsError(f"{path} does not match its own hash: delete it, and it is made again")
    return corpus
