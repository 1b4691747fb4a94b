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
    group.command()(run)
    group.command()(recipes)
    group.command()(teach)
    group.command()(export)
    app.add_typer(group)


def run(
    recipe: Annotated[str, typer.Argument(help="A ready recipe by name, or a TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; the same one again resumes.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder of what teachers said, by content.")] = Path("~/.cache/stillroom"),
) -> None:
    """Make a model as a recipe says: lessons, teachers, training, export."""
    from stillroom_shared.asked import only_our_own_progress, pairs

    only_our_own_progress()
    from rich.console import Console

    from stillroom_server.distillery.recipe import load_recipe
    from stillroom_server.distillery.run import Run
    from stillroom_server.distillery.stages import STAGES, planned
    from stillroom_server.distillery.training.train import processes
    from stillroom_shared.progress import Progress

    chosen = load_recipe(recipe, pairs(changes or []))
    first = processes().is_main_process
    progress = Progress(
        {name: STAGES[name] for name in planned(chosen)}, console=Console(highlight=False, quiet=not first)
    )
    model = Run(chosen, out, cache.expanduser() / "distillery").all_stages(progress)
    if first:
        typer.echo(
            f"\nmodel    {model}\nfigures  {model / 'distillation.json'}\ncurves   tensorboard --logdir {out / 'training'}"
        )


def recipes() -> None:
    """List the recipes that come with Stillroom."""
    from rich.console import Console
    from rich.table import Table

    from stillroom_server.distillery.recipe import load_recipe, ready

    table = Table("recipe", "what it makes", box=None, pad_edge=False, header_style="bold")
    for name in ready():
        table.add_row(name, load_recipe(name, {}).about)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nstillroom distill run NAME --out DIR   makes one; a file of your own begins as a copy of:", markup=False
    )
    console.print(str(next(iter(ready().values())).parent), markup=False, soft_wrap=True)


def teach(
    out: Annotated[Path, typer.Option(help="Folder of the cross-encoder; the same command again resumes.")],
    lessons: Annotated[
        Path | None, typer.Option(help="Folder of prepared lessons: lists with known relevance.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="BEIR folder whose train queries teach; may be repeated.")
    ] = None,
    miner: Annotated[
        str, typer.Option(help="Bi-encoder that finds hard negatives in --data; `words`: none is asked.")
    ] = "offline",
    settings: Annotated[Path | None, typer.Option(help="A TOML file with keys such as loss and learning_rate.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder of what teachers said, by content.")] = Path("~/.cache/stillroom"),
) -> None:
    """Fine-tune a cross-encoder on labelled public text, before it teaches."""
    from stillroom_shared.asked import only_our_own_progress, pairs

    only_our_own_progress()
    from rich.console import Console

    from stillroom_server.distillery.lessons import Lessons
    from stillroom_server.distillery.teaching import TeachSettings
    from stillroom_server.distillery.teaching import teach as fine_tune
    from stillroom_server.distillery.teaching_data import lessons_from
    from stillroom_shared.errors import SettingsError
    from stillroom_shared.progress import Progress
    from stillroom_shared.settings_file import load

    if (lessons is None) == (not data):
        raise SettingsError("teach takes --lessons or --data: give one of them")
    chosen = load(TeachSettings(), settings, pairs(changes or []))
    plan = {"lessons": 60.0, "teach": 300.0} if data else {"teach": 300.0}
    progress = Progress(plan, console=Console(highlight=False))
    if lessons is None:
        lessons, kept = out.with_name(f"{out.name}.lessons"), cache.expanduser() / "distillery"
        with progress.stage("lessons") as stage:
            made = lessons_from(data or [], chosen, lessons, miner=miner, cache=kept, progress=stage)
            stage.note(f"{len(made):,} texts, {made.lists:,} lists of {made.candidates}")
    with progress.stage("teach") as stage:
        done = fine_tune(Lessons.open(lessons), chosen, out, stage)
        stage.note(f"{done.lists:,} lists, {done.steps:,} steps")
    typer.echo(f"nDCG@10 on {done.held_out:,} held-out lists: {done.before:.3f} before, {done.after:.3f} after: {out}")


def export(
    model: Annotated[str, typer.Argument(help="offline, or folder or name of a Sentence Transformers model.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the model and its ONNX files.")],
) -> None:
    """Write any model with the ONNX files that students get, to measure it by the same runtime."""
    from stillroom_shared.asked import only_our_own_progress

    only_our_own_progress()
    from stillroom_server.distillery.exporting import export_named
    from stillroom_shared.release import ONNX_FILES

    for name, value in export_named(model, out).items():
        typer.echo(f"{name.replace('_', ' '):16} {value:,.6g}")
    for precision, path in ONNX_FILES.items():
        typer.echo(f"stillroom evaluate {out}@{precision}  measures {path}")
