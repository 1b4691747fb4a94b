"""Large arrays as `.npy` files that appear whole: filled through a memory map, never held."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stillroom_shared.files import sync

_BLOCK = 8_192


@contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """An array to fill, mapped to a temporary sibling that becomes `path` at the end, or vanishes with an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if 0 in shape:  # nothing to map
            with partial.open("wb") as file:
                np.save(file, np.zeros(shape, dtype))
            yield np.zeros(shape, dtype)
        else:
            array = np.lib.format.open_memmap(partial, "w+", np.dtype(dtype), shape)
            yield array
            array.flush()
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def changed_array(
    out: Path,
    source: NDArray[Any],
    change: Callable[[NDArray[Any], slice], NDArray[Any]],
    *,
    block: int = _BLOCK,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[Any]:
    """`source` with `change` applied to each block of rows, memory-mapped from `out`, of the type that it had.

    Args:
        change: of a block and of the rows that it is of to a block of the same shape.
        block: rows that are held at once.
    """
    with new_array(out, source.shape, source.dtype) as array:
        for start in range(0, len(source), block):
            part = slice(start, min(start + block, len(source)))
            array[part] = change(source[part], part)
            progress(part.stop, len(source))
    return open_array(out)


def open_array(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file, memory-mapped for reading."""
    mapped: NDArray[Any] = np.load(path, mmap_mode="r")
    return mapped
