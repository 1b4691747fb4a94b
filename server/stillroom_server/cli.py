"""`stillroom release`: what an operator asks about a release before shipping it.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of the server room."""
    group = typer.Typer(name="release", help="Verify and show releases.", no_args_is_help=True)
    group.command()(verify)
    # A second command keeps the name of the first: typer drops the name of a group's only command.
    group.callback()(lambda: None)
    app.add_typer(group)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of the release.")],
    key: Annotated[str | None, typer.Option(help="Public key that must have signed it, in hexadecimal.")] = None,
) -> None:
    """Check every hash and the signature, and print what the release says about itself."""
    from stillroom_shared.release import open_release

    release = open_release(folder, trusted_key=key)
    typer.echo(release.manifest.model_dump_json(indent=2, exclude={"files"}))
    typer.echo("every file and the signature hold")
