"""The full-text index of an encrypted home. Tantivy maps plain files, and none may lie on a disk.

On disk, the index of a generation is one sealed file, `index.tantivy/STAMP`: the folder that `text_index.py` would have there,
files after each other. To be used or brought forward it is unpacked into a folder in memory (`memory_folder.py`), which is
removed as soon as Tantivy has mapped its files: they stay readable to this process alone, and go with it.

| case | what happens |
|---|---|
| a home in the clear | `text_index.py`, and nothing else |
| altered, cut short, or of another home | "torn": built anew |
| of an earlier generation, or rolled back to one | "stale": brought forward, or built anew |
| no folder in memory, or no room there | "missing": built in memory at every opening, nothing is written |
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from stillroom_client.index_base import Fault
from stillroom_client.memory_folder import memory_folder
from stillroom_client.store import Generation, Store
from stillroom_client.text_index import TextIndex, tidy, write_index
from stillroom_shared.errors import EncryptionError
from stillroom_shared.files import replace_file
from stillroom_shared.vault import Vault

_LENGTH = struct.Struct(">I")


def load_words(folder: Path, generation: Generation, vault: Vault) -> TextIndex | Fault:
    """The saved index of this generation, or why there is none."""
    if vault.is_plain:
        return TextIndex.load(folder, generation)
    place = folder / generation.stamp
    try:
        content = vault.open(_name(place), place.read_bytes())
        with memory_folder() as memory:
            if memory is None:
                return "missing"
            _unpack(content, memory / place.name)
            return TextIndex.load(memory, generation)
    except FileNotFoundError:
        return "stale" if folder.is_dir() and any(folder.iterdir()) else "missing"
    except (OSError, EncryptionError):
        return "torn"


def write_words(folder: Path, store: Store, generation: Generation, *, afresh: bool = False) -> None:
    """As `text_index.write_index`."""
    if store.vault.is_plain:
        write_index(folder, store, generation, afresh=afresh)
        return
    with memory_folder() as memory:
        if memory is None:
            raise OSError("there is no folder in memory to make the index in")
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in () if afresh else folder.iterdir():
            _unpack_known(place, memory, store.vault)
        write_index(memory, store, generation, afresh=afresh)
        content = _packed(memory / generation.stamp)
    place = folder / generation.stamp
    replace_file(place, *store.vault.seal(_name(place), *content))
    if not afresh:
        tidy_words(folder, generation)


def tidy_words(folder: Path, generation: Generation) -> None:
    """Remove every index but that of a committed generation, folders and sealed files."""
    tidy(folder, generation)
    for other in folder.iterdir():
        if other.name != generation.stamp and not other.is_dir():
            other.unlink(missing_ok=True)


def _unpack_known(place: Path, memory: Path, vault: Vault) -> None:
    """An index to begin with; one that cannot be read is none."""
    try:
        _unpack(vault.open(_name(place), place.read_bytes()), memory / place.name)
    except (OSError, EncryptionError):
        return


def _name(place: Path) -> str:
    return f"{place.parent.name}/{place.name}"


def _packed(folder: Path) -> list[bytes]:
    """Length of a table, the table of names and sizes, the files."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = [path.read_bytes() for path in paths]
    table = json.dumps([[path.name, len(file)] for path, file in zip(paths, files, strict=True)]).encode()
    return [_LENGTH.pack(len(table)), table, *files]


def _unpack(content: bytes, folder: Path) -> None:
    (length,) = _LENGTH.unpack_from(content)
    begin = _LENGTH.size + length
    folder.mkdir(mode=0o700)
    for name, size in json.loads(content[_LENGTH.size : begin]):
        with open(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(memoryview(content)[begin : begin + size])
        begin += size
