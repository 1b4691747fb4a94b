"""From what is chosen on the page to one filter line (`filters.py`), and what there is to choose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stillroom_client.described import fields
from stillroom_client.device import Device
from stillroom_client.filters import compile_filter

_MOST_FOLDERS = 40
_MOST_OWNERS = 100


class Narrowing(BaseModel):
    """What the page narrows a search to; `where` is the line that its owner typed.

    >>> Narrowing(type="pdf", folder="/home/ann/it's", since=2020).line
    "type='pdf' and path>='/home/ann/it''s/' and path<'/home/ann/it''s0' and year>=2020"
    >>> Narrowing(where="a=1 or b=2", owner="me").line
    "(a=1 or b=2) and owner='me'"
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str = Field(default="", max_length=4_000)
    type: str | None = Field(default=None, max_length=100)
    owner: str | None = Field(default=None, max_length=1_000)
    folder: str | None = Field(default=None, max_length=1_000)
    year: int | None = None
    since: int | None = None

    @property
    def line(self) -> str | None:
        """The filter; None for all passages. A folder is what lies between its path with "/" and that with the next sign."""
        parts = [f"({self.where})"] if self.where.strip() else []
        parts += [f"type={_quoted(self.type)}"] if self.type is not None else []
        parts += [f"owner={_quoted(self.owner)}"] if self.owner is not None else []
        if self.folder is not None:
            parts += [f"path>={_quoted(self.folder + '/')}", f"path<{_quoted(self.folder + '0')}"]
        parts += [f"year={self.year}"] if self.year is not None else []
        parts += [f"year>={self.since}"] if self.since is not None else []
        return " and ".join(parts) or None

    def checked(self, device: Device) -> str | None:
        """The filter, after the typed line was read by itself: an error shows its place there, and no bracket escapes."""
        if self.where.strip():
            compile_filter(self.where, fields(device.store))
        return self.line


def choices(device: Device) -> dict[str, Any]:
    """What a search can be narrowed to: each value with its count, of documents, or of passages for owners."""
    paths = [path for (path,) in device.store.query("SELECT path FROM documents")]
    years = device.store.query(
        "SELECT json_extract(metadata, '$.year') AS year, count(*) FROM documents "
        "WHERE typeof(json_extract(metadata, '$.year')) = 'integer' GROUP BY year ORDER BY year DESC"
    )
    return {
        "types": list(device.catalog.types().items()),
        "owners": list(device.store.owners().items())[:_MOST_OWNERS],
        "folders": folders(paths),
        "years": years,
    }


def folders(paths: Iterable[str], most: int = _MOST_FOLDERS) -> list[tuple[str, str, int]]:
    """Folders of documents, as deep as `most` of them allow: (path, its part below what all share, documents in it).

    >>> folders(["/home/a/x/1.md", "/home/a/x/2.md", "/home/a/y/z/3.md", "/home/a/4.md"], most=3)
    [('/home/a/x', 'x', 2), ('/home/a/y', 'y', 1), ('/home/a/y/z', 'y/z', 1)]
    """
    parents = [tuple(path.split("/")[:-1]) for path in paths if path.startswith("/")]
    shared = 0
    while parents and all(len(p) > shared for p in parents) and len({p[shared] for p in parents}) == 1:
        shared += 1
    chosen: Counter[tuple[str, ...]] = Counter()
    for depth in range(shared + 1, max(map(len, parents), default=0) + 1):
        deeper = Counter(parent[:depth] for parent in parents if len(parent) >= depth)
        if len(chosen) + len(deeper) > most:
            break
        chosen += deeper
    return [("/".join(key), "/".join(key[shared:]), count) for key, count in sorted(chosen.items())]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
