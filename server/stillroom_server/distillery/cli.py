"""`stillroom distill`: what an operator does before any round.

Only typer is imported here; what a command needs is imported when it runs (`stillroom_shared.cli`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(name="distill", help="Make a small search model from large ones.", no_args_is_help=True)
    group.command()(teach)
    group.callback()(lambda: None)
    app.add_typer(group)


def teach(
    lessons: Annotated[Path, typer.Option(help="Folder of lessons: lists of passages with known relevance.")],
    out: Annotated[Path, typer.Option(help="Folder of the cross-encoder; the same command again resumes.")],
    settings: Annotated[Path | None, typer.Option(help="A TOML file with keys such as loss and learning_rate.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
) -> None:
    """Fine-tune a cross-encoder on labelled public lists, before it teaches."""
    from stillroom_shared.asked import only_our_own_progress, pairs

    only_our_own_progress()
    from rich.console import Console

    from stillroom_server.distillery.lessons import Lessons
    from stillroom_server.distillery.teaching import TeachSettings
    from stillroom_server.distillery.teaching import teach as fine_tune
    from stillroom_shared.progress import Progress
    from stillroom_shared.settings_file import load

    chosen = load(TeachSettings(), settings, pairs(changes or []))
    with Progress({"teach": 300.0}, console=Console(highlight=False)).stage("teach") as stage:
        done = fine_tune(Lessons.open(lessons), chosen, out, stage)
        stage.note(f"{done.lists:,} lists, {done.steps:,} steps")
    typer.echo(f"nDCG@10 on {done.held_out:,} held-out lists: {done.before:.3f} before, {done.after:.3f} after: {out}")
