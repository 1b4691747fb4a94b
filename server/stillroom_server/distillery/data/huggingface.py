"""Rows of a Hugging Face data set in streaming mode: nothing is downloaded but what is read, nothing is held but a row.

| `data` | what is read |
|---|---|
| a folder | its json, jsonl, csv or parquet files, as `datasets.load_dataset` finds their splits; works offline |
| one such file | that file, whose split is called train |
| a name | the data set on the hub at a commit, that of `revision` or the newest, which is recorded |
| a folder written by `save_to_disk` | refused with the remedy |

| a column's value | what happens |
|---|---|
| text | one |
| a list of texts | several relevant passages; their titles, if they are a list too, go with them |
| None | nothing |
| anything else | `DataError` with row and column |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from stillroom_server.distillery.data.settings import SourceSettings
from stillroom_shared.errors import DataError
from stillroom_shared.workspace import content_key

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Row:
    """A query ("" where there is none), passages that are relevant to it, and further ones of which nothing is known."""

    query: str
    passages: tuple[str, ...]
    others: tuple[str, ...]


def opened(settings: SourceSettings) -> tuple[Iterator[Row], dict[str, Any]]:
    """The rows of a data set, and what is known about it: name, split, revision or a hash of its files.

    Raises:
        DataError: it cannot be had, lacks a column, or a row holds something that is no text.
    """
    place, arguments, facts = _located(settings)
    try:
        stream = load_dataset(place, split=settings.split, streaming=True, **arguments)
        first = next(iter(stream), None)
    except Exception as error:  # whatever the library and its file systems raise: all of it means the same to the user
        raise DataError(
            f"source {settings.title!r}: {settings.data} cannot be read ({type(error).__name__}: {error}): give a folder "
            f"with json, csv or parquet files, or a name with network access; and a split that it has"
        ) from error
    if first is None:
        raise DataError(f"source {settings.title!r}: split {settings.split} of {settings.data} has no rows")
    columns = _columns(settings)
    if absent := [column for column in columns.values() if column not in first]:
        raise DataError(f"source {settings.title!r} has no column {absent[0]!r}: its columns are {', '.join(first)}")
    return _rows(stream, columns, settings.title), {**facts, "split": settings.split, "columns": columns}


def _located(settings: SourceSettings) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What to load, with which arguments, and what to record about it."""
    path = Path(settings.data).expanduser()
    subset = {"name": settings.subset} if settings.subset else {}
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise DataError(f"{path} is not one of {', '.join(_BUILDERS)}: convert it")
        return _BUILDERS[path.suffix], {"data_files": str(path)}, {"files": content_key(path)}
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            raise DataError(f"{path} was written by save_to_disk: write it with to_parquet or to_json instead")
        return str(path), subset, {"files": content_key(path)}
    revision, licence = _on_the_hub(settings)
    recorded = {"data_set": settings.data, "revision": revision, **({"licence": licence} if licence else {})}
    return settings.data, {**subset, "revision": revision}, recorded


def _on_the_hub(settings: SourceSettings) -> tuple[str, str]:
    """The commit that `revision`, a branch or nothing stands for, and the licence on the card unless one was given."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(settings.data, revision=settings.revision)
    except Exception as error:  # offline, unknown, gated: each with a class of its own in each version
        raise DataError(
            f"source {settings.title!r}: {settings.data} is no folder here and cannot be looked up on the hub "
            f"({type(error).__name__}: {error}): check the name and the network, or give a folder"
        ) from error
    return str(info.sha), settings.licence or str(getattr(info.card_data, "license", None) or "")


def _columns(settings: SourceSettings) -> dict[str, str]:
    wanted = {"query": settings.query_column} if settings.use != "passages" else {}
    if settings.use != "queries":
        wanted |= {"passage": settings.passage_column, "title": settings.title_column, "other": settings.other_column}
    return {role: column for role, column in wanted.items() if column}


def _rows(stream: IterableDataset, columns: Mapping[str, str], title: str) -> Iterator[Row]:
    for number, row in enumerate(stream):
        texts = {role: _texts(row[column], title, number, column) for role, column in columns.items()}
        titled = itertools.zip_longest(texts.get("passage", ()), texts.get("title", ()), fillvalue="")
        passages = tuple(f"{head}\n{body}" if head else body for body, head in titled if body.strip())
        query = " ".join(texts.get("query", ())).strip()
        if query or passages or texts.get("other"):
            yield Row(query, passages, texts.get("other", ()))


def _texts(value: object, title: str, row: int, column: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in values if not isinstance(one, str | None)]:
        raise DataError(
            f"source {title!r}, row {row}, column {column!r}: {str(wrong[0])[:40]!r} is a {type(wrong[0]).__name__}, "
            "not text: name another column"
        )
    return tuple(str(one or "") for one in values)
