"""`stillroom evaluate`. Only typer is imported here (`stillroom_shared.cli`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from stillroom_shared.asked import only_our_own_progress, pairs
from stillroom_shared.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from stillroom_shared.corpus import Corpus, Split


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folder or name of a Sentence Transformers model, offline, a release, a device, bm25, or QUERY::DOCUMENT.",
        ),
    ],
    data: Annotated[list[Path], typer.Option(help="A folder in BEIR layout; may be repeated.")],
    split: Annotated[
        str | None, typer.Option(help="train, dev or test.  [default: test where there is one, otherwise dev]")
    ] = None,
    first_stage: Annotated[str, typer.Option(help="What a cross-encoder re-ranks: bm25 or another MODEL.")] = "bm25",
    rerank: Annotated[int, typer.Option(min=1, help="How many of its best passages a cross-encoder reads.")] = 100,
    first_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Weight of its scores in a cross-encoder's ranking; 0: none.  [default: a device's]"
        ),
    ] = None,
    latency: Annotated[int, typer.Option(min=0, help="Queries to time each model with; 0: none.")] = 200,
    ignore_identical_ids: Annotated[
        bool, typer.Option(help="Leave out a passage with the query's own id, as ArguAna and Quora need.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, ...")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: everything, scores of each query included.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file.")] = None,
    settings: Annotated[
        Path | None, typer.Option(envvar="STILLROOM_SETTINGS", help="A TOML file; docs/settings.md lists its keys.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: speed.threads, speed.cache, seed."),
    ] = None,
) -> None:
    """Measure search models on BEIR folders: quality with intervals, differences to the first with tests, speed and bytes."""
    only_our_own_progress()
    import json
    from dataclasses import replace

    from rich.console import Console

    from stillroom_shared.files import replace_file
    from stillroom_shared.settings import load_settings
    from stillroom_simulations.evaluating.run import Choices, evaluate_models
    from stillroom_simulations.evaluating.tables import show

    made = load_settings(settings, pairs(changes or []))
    choices = Choices(
        split=_split(split), first_stage=first_stage, rerank=rerank, timed=latency, threads=made.speed.threads,
        device=device, ignore_identical_ids=ignore_identical_ids, seed=made.seed, cache=made.speed.cache / "evaluate",
    )  # fmt: skip
    if first_share is not None:
        choices = replace(choices, first_share=first_share)
    if out is not None and not out.parent.is_dir():  # before an hour of work, not after
        raise SettingsError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and out.is_dir():
        raise SettingsError(f"--out {out} is a folder: name a file in it")
    watched = Console(stderr=True, highlight=False)
    found = evaluate_models(models, _corpora(data, watched), choices, console=watched)
    text = json.dumps(found.to_json(), indent=1)
    if out is not None:
        replace_file(out, text.encode() + b"\n")
    if as_json:
        typer.echo(text)
    else:
        show(found, Console(highlight=False))


def _corpora(folders: list[Path], console: Console) -> list[Corpus]:
    """The folders, with the splits that are published."""
    from stillroom_shared.beir import load_beir

    corpora = []
    for folder in folders:
        corpora.append(load_beir(folder, splits="as-published"))
        for note in corpora[-1].notes:
            console.print(f"{corpora[-1].name}: {note}", markup=False, soft_wrap=True)
    return corpora


def _split(name: str | None) -> Split | None:
    from stillroom_shared.corpus import SPLITS, Split

    for split in get_args(Split):
        if split == name:
            found: Split = split
            return found
    if name is not None:
        raise SettingsError(f"--split {name!r} is unknown: choose {', '.join(SPLITS)}")
    return None
