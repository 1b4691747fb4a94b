"""The operator's side of Stillroom: it distils a release, and coordinates the rounds that improve it.

Public names are loaded when first asked for: the command line imports this package to print its help.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom_server.app import server_app as server_app
    from stillroom_server.cohort import Rotation as Rotation
    from stillroom_server.coordinate import Coordinator as Coordinator
    from stillroom_server.coordinate import RoundReport as RoundReport
    from stillroom_server.docstrings import DocstringSource as DocstringSource
    from stillroom_server.docstrings import docstring_corpus as docstring_corpus
    from stillroom_server.plan import Plan as Plan
    from stillroom_server.stream import RowStream as RowStream
    from stillroom_server.teacher import TeacherVectors as TeacherVectors

_HOME = {
    "Coordinator": "coordinate",
    "DocstringSource": "docstrings",
    "Plan": "plan",
    "Rotation": "cohort",
    "RoundReport": "coordinate",
    "RowStream": "stream",
    "TeacherVectors": "teacher",
    "docstring_corpus": "docstrings",
    "server_app": "app",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
