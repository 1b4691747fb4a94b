"""`stillroom bench distill` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_distill(
    data: Annotated[list[Path], typer.Option(help="A BEIR-layout folder; may be repeated.")],
    families: Annotated[
        str, typer.Option(help="What to compare, comma-separated: recipes, left-out, docstrings.")
    ] = "recipes,left-out,docstrings",
    recipes: Annotated[
        str, typer.Option(help="Recipes to compare, comma-separated.")
    ] = "align,matryoshka,listwise,multi-teacher,synthetic,data-free",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    passages: Annotated[int | None, typer.Option(min=1, help="Most passages to learn from of each set.")] = None,
    packages: Annotated[
        str | None, typer.Option(help="Import names whose docstrings are read.  [default: the public ones]")
    ] = None,
    timed: Annotated[int, typer.Option(min=0, help="Queries that are timed; 0: none.")] = 100,
    sentences: Annotated[int, typer.Option(min=0, help="Compare rates of training on so many; 0: not.")] = 5_000,
    folder: Annotated[Path, typer.Option(help="Where the runs go; the same folder again resumes.")] = Path(
        "runs/distill"
    ),
    cache: Annotated[Path, typer.Option(help="Folder of what teachers said, by content.")] = Path("~/.cache/stillroom"),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/distill.json"),
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every recipe.")
    ] = None,
) -> None:
    """Measure every recipe on the same data sets, over several seeds, and how fast alignment trains."""
    from stillroom_shared.asked import numbers, only_our_own_progress, pairs

    only_our_own_progress()
    from rich.console import Console

    from stillroom_server.docstrings import FULL
    from stillroom_simulations.distill_bench.run import Asked
    from stillroom_simulations.distill_bench.run import bench_distill as measure

    words = [*(f"--data {path.name}" for path in data), f"--families {families}", f"--recipes {recipes}"]
    words += [f"--seeds {seeds}", f"--timed {timed}", f"--sentences {sentences}"]
    words += [f"--packages {packages}"] * (packages is not None)
    words += [f"--passages {passages}"] * (passages is not None) + [f"--set {change}" for change in changes or []]
    asked = Asked(
        data=data,
        families=families.split(","),
        recipes=recipes.split(","),
        seeds=numbers(seeds),
        passages=passages,
        packages=packages.split(",") if packages else FULL.public,
        changes=pairs(changes or []),
        timed=timed,
        sentences=sentences,
        folder=folder,
        cache=cache.expanduser(),
    )
    measure(asked, out=out, console=Console(highlight=False), command=" ".join(["stillroom bench distill", *words]))
    typer.echo(f"\nfigures  {out}")
