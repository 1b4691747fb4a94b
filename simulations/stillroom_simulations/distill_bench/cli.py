"""`stillroom bench distill` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_distill(
    data: Annotated[list[Path], typer.Option(help="A BEIR-layout folder; may be repeated.")],
    families: Annotated[
        str,
        typer.Option(
            help="What to measure, comma-separated: recipes, left-out, docstrings, matryoshka, teachers, rerank, memory, "
            "rates, or all. Figures of the others stay in the file."
        ),
    ] = "all",
    arms: Annotated[
        str | None, typer.Option(help="Names of arms, comma-separated.  [default: all of the families]")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    studies: Annotated[
        Path | None, typer.Option(help="TOML file of what is compared.  [default: the one that comes with Stillroom]")
    ] = None,
    passages: Annotated[
        int | None, typer.Option(min=0, help="Most passages to learn from of each set, beside those of its queries.")
    ] = None,
    packages: Annotated[
        str | None, typer.Option(help="Import names whose docstrings are read.  [default: the public ones]")
    ] = None,
    timed: Annotated[int, typer.Option(min=0, help="Queries that are timed; 0: none.")] = 100,
    folder: Annotated[Path, typer.Option(help="Where the runs go; the same folder again resumes.")] = Path(
        "runs/distill"
    ),
    cache: Annotated[Path, typer.Option(help="Folder of what teachers said, by content.")] = Path("~/.cache/stillroom"),
    out: Annotated[Path, typer.Option(help="The benchmark file to write.")] = Path("benchmarks/results/distill.json"),
    replace: Annotated[
        bool, typer.Option("--replace", help="Let figures leave the file that are not measured again.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every recipe.")
    ] = None,
) -> None:
    """Measure every recipe on the same data sets, over several seeds: quality, seconds, size, latency, and goals."""
    from stillroom_shared.asked import numbers, only_our_own_progress, pairs

    only_our_own_progress()
    from rich.console import Console

    from stillroom_server.docstrings import FULL
    from stillroom_simulations.distill_bench.arms import FAMILIES, STUDIES
    from stillroom_simulations.distill_bench.run import Asked
    from stillroom_simulations.distill_bench.run import bench_distill as measure

    words = [*(f"--data {path.name}" for path in data), f"--families {families}"]
    words += [f"--arms {arms}"] * (arms is not None) + [f"--seeds {seeds}", f"--timed {timed}"]
    words += [f"--studies {studies.name}"] if studies else []
    words += [f"--packages {packages}"] * (packages is not None)
    words += [f"--passages {passages}"] * (passages is not None) + [f"--set {change}" for change in changes or []]
    asked = Asked(
        data=data,
        families=FAMILIES if families == "all" else families.split(","),
        arms=arms.split(",") if arms else None,
        studies=studies or STUDIES,
        seeds=numbers(seeds),
        passages=passages,
        packages=packages.split(",") if packages else FULL.public,
        changes=pairs(changes or []),
        timed=timed,
        folder=folder,
        cache=cache.expanduser(),
        replace=replace,
    )
    measure(asked, out=out, console=Console(highlight=False), command=" ".join(["stillroom bench distill", *words]))
    typer.echo(f"\nfigures  {out}")
