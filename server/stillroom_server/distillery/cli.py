"""`stillroom distill`: what an operator does before any round.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(name="distill", help="Make a small search model from large ones.", no_args_is_help=True)
    group.callback()(lambda: None)
    app.add_typer(group)
