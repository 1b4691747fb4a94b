"""Load a Sentence Transformers model of any type, without the library's chatter, or say that it cannot be had."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from stillroom_server.teacher import folder_of
from stillroom_shared.errors import SettingsError

Model = TypeVar("Model")


def load_model(kind: Callable[..., Model], name: str, **options: Any) -> Model:
    """`kind(folder of name, **options)`.

    Raises:
        SettingsError: there is no such model, or not of this kind.
    """
    try:
        with quiet():
            return kind(folder_of(name), **options)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"model {name!r} cannot be loaded ({first}): give a folder, or a name with network access"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No reports of keys that fit, no bars, no notes on conversion: errors only."""
    library, verbosity = logging.getLogger("sentence_transformers"), transformers_logging.get_verbosity()
    level, bars = library.level, transformers_logging.is_progress_bar_enabled()
    library.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
