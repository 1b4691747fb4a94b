"""Make every arm for every seed, measure each on its data sets, and write what was found, family by family.

Nothing is done twice: runs resume by their stages, measuring stays while its models do (`measuring.py`), and families that are
not asked for keep their figures in the file (`record.py`). The file is written after each family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom_server.distillery.recipe import Recipe
from stillroom_server.teacher import OFFLINE, load_teacher
from stillroom_shared.beir import load_beir
from stillroom_shared.errors import SettingsError
from stillroom_shared.scales import FIRST_SHARE
from stillroom_shared.workspace import key_of
from stillroom_simulations.distill_bench.arms import (
    FAMILIES,
    STUDIES,
    TRAINED,
    Arm,
    Public,
    RateSettings,
    arms,
    load_studies,
)
from stillroom_simulations.distill_bench.goals import Figures, Results, figures_of
from stillroom_simulations.distill_bench.measuring import Bench
from stillroom_simulations.distill_bench.memory import measure_memory
from stillroom_simulations.distill_bench.record import Record
from stillroom_simulations.distill_bench.throughput import compare_rates, rate_figures

if TYPE_CHECKING:
    from rich.console import Console

_HELD_OUT = 500


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure.

    Attributes:
        data: BEIR folders.
        families: some of `FAMILIES`.
        arms: names of the arms in them that are measured; None for all.
        studies: the file of arms.
        passages: most passages that are learned from of each set, whatever the arms say.
        packages: whose docstrings and documentation are read.
        changes: settings laid over every recipe, by dotted key.
        timed: queries that are timed; 0 for none.
        folder: of the runs; the same again resumes.
        cache: of what teachers said.
        replace: let figures leave the file that are not measured again.
    """

    data: Sequence[Path]
    families: Sequence[str]
    arms: Sequence[str] | None = None
    studies: Path = STUDIES
    seeds: Sequence[int]
    passages: int | None = None
    packages: Sequence[str]
    changes: Mapping[str, str]
    timed: int
    folder: Path
    cache: Path
    replace: bool = False


def bench_distill(asked: Asked, *, out: Path, console: Console, command: str) -> dict[str, Any]:
    """Run or resume everything, then write the benchmark file (DESIGN section 9).

    Raises:
        SettingsError: a family, an arm, a recipe or a set is unknown, or `out` would lose figures; before anything is made.
    """
    studies = load_studies(asked.studies)
    corpora = {folder: load_beir(folder, splits="as-published") for folder in asked.data}
    if len({one.name for one in corpora.values()}) < len(asked.data):
        raise SettingsError(
            f"--data {', '.join(map(str, asked.data))}: two folders have one name, by which figures are told apart: rename one"
        )
    public = Public(corpora=corpora, packages=asked.packages, passages=asked.passages)
    wanted = list(arms(studies, asked.families, public, asked.changes, names=asked.arms))
    bench = Bench(
        public=public, studies=studies, changes=asked.changes, timed=asked.timed, folder=asked.folder, cache=asked.cache,
        console=console,
    )  # fmt: skip
    digests = _digests(bench, asked)
    sets = {one.name: one.content_hash for one in corpora.values()}
    record = Record(command=command, seeds=asked.seeds, sets=sets, digests=digests)
    by_family = {
        family: [arm for arm in wanted if arm.settings.family == family]
        for family in FAMILIES
        if family in asked.families
    }
    names = {
        family: list(dict.fromkeys(arm.settings.name for arm in found)) if family in TRAINED else list(digests[family])
        for family, found in by_family.items()
    }
    record.take_over(out, names, replace=asked.replace)
    for family, found in by_family.items():
        figures = _of_arms(found, bench, asked.seeds) if family in TRAINED else _of_machine(family, bench)
        record.add(family, names[family], figures)
        record.write(out)
    return record.write(out)


def _digests(bench: Bench, asked: Asked) -> dict[str, dict[str, str]]:
    """By family and arm, what figures depend on beside seeds and sets: where it can be made."""
    own = [asked.timed, list(asked.packages), asked.passages]
    found: dict[str, dict[str, str]] = {
        "memory": {"memory": key_of(bench.studies.memory.model_dump())},
        "rates": {"rates": key_of(bench.studies.rates.model_dump())},
    }
    for settings in bench.studies.arms:
        try:
            made = [*arms(bench.studies, [settings.family], bench.public, asked.changes, names=[settings.name])]
        except SettingsError:  # of a family that is not asked for: a set is missing, or changes do not fit
            continue
        taught = [_taught(bench, name) for name in {made[0].maker.taught} if name]
        shares = [FIRST_SHARE] if made[0].recipe.student.kind == "reranker" else []
        found.setdefault(settings.family, {})[settings.name] = key_of(
            [arm.digest for arm in made], taught, own, *shares
        )
    return found


def _taught(bench: Bench, name: str) -> list[Any]:
    """What a cross-encoder depends on: its table, and the recipe that this names as it is now."""
    learning = bench.studies.taught[name]
    recipe = bench.public.recipe(learning, bench.changes)
    return [learning.model_dump(mode="json"), recipe.model_dump(mode="json", exclude={"data": {"sources", "exclude"}})]


def _of_arms(found: Sequence[Arm], bench: Bench, seeds: Sequence[int]) -> Figures:
    """Make and measure arms of one family; those for different sets that were left out are one in the figures."""
    results: dict[str, Results] = {}
    for arm in found:
        measured = [bench.measured(arm, seed) for seed in seeds]
        sets: dict[str, Sequence[Mapping[str, Any]]] = {
            name: [one["sets"][name] for one in measured] for name in measured[0]["sets"]
        }
        seconds = [one["seconds"] for one in measured]
        if (before := results.get(arm.settings.name)) is not None:
            sets, seconds = {**before.sets, **sets}, [*before.seconds, *seconds]
        results[arm.settings.name] = Results(arm.settings, seconds, sets)
    figures: Figures = {}
    for one in results.values():
        figures |= figures_of(one, results)
    return figures


def _of_machine(family: str, bench: Bench) -> Figures:
    if family == "memory":
        return measure_memory(bench.studies.memory, bench.folder / "memory", bench.console)
    return _rates(bench, bench.studies.rates)


def _rates(bench: Bench, settings: RateSettings) -> Figures:
    """How fast alignment trains beside the plain recipe, on queries of the data sets."""
    bench.console.print(f"rates of training on {settings.sentences:,} sentences", markup=False)
    corpora = bench.public.corpora.values()
    texts = sorted({query.text for corpus in corpora for query in corpus.queries_in("train")})
    np.random.default_rng(0).shuffle(texts)
    held_out, texts = texts[: min(_HELD_OUT, len(texts) // 2)], texts[min(_HELD_OUT, len(texts) // 2) :]
    recipe = Recipe()
    training = recipe.training.model_copy(update={"epochs": 1.0})
    rates = compare_rates(
        load_teacher(OFFLINE), texts[: settings.sentences], held_out, recipe.student, training, repeats=settings.repeats
    )
    return rate_figures(rates)
