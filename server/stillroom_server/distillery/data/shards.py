"""Long work in pieces that are kept: a run that was cut off goes on after the last piece that was complete.

A piece is some arrays in one Arrow file, FOLDER/00000017.arrow, written whole and renamed. The folder's name must say all that
the pieces depend on (`workspace.key_of`); nothing is checked when a piece is read again but that it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from stillroom_shared.errors import DataError
from stillroom_shared.files import sync


class Shards:
    """Pieces of one kind of work."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def get(self, number: int, make: Callable[[], pa.Table]) -> pa.Table:
        """The piece of that number, memory-mapped, made first where it is not there."""
        path = self._path(number)
        if not path.exists():
            self._write(path, make())
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is damaged ({error}): delete it, and it is made again") from error

    def _write(self, path: Path, table: pa.Table) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with pa.ipc.new_file(str(partial), table.schema) as file:
            file.write_table(table)
        sync(partial)
        partial.replace(path)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.arrow"
