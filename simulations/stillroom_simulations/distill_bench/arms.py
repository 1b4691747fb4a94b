"""What is compared: a recipe on a body of public text, as one value for each arm.

| family | text | measured on |
|---|---|---|
| `recipes` | docstrings, and the train queries and passages of the labelled sets | all sets |
| `left-out` | docstrings, documentation, and everything public of the other sets | the set that is left out |
| `docstrings` | docstrings alone | all sets |

Whatever the text, queries that any set is measured on are taken out of it (`data.exclude`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom_server.distillery.data.settings import DataSettings, ExcludeSettings, SourceSettings
from stillroom_server.distillery.recipe import Recipe, load_recipe
from stillroom_server.docstrings import FULL
from stillroom_shared.corpus import Corpus
from stillroom_shared.errors import SettingsError

FAMILIES = ("recipes", "left-out", "docstrings")
BASE = "align"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is measured.

    Attributes:
        family: one of `FAMILIES`.
        name: of the recipe, or of the set that is left out.
        recipe: on its text, of seed 0.
        sets: names of the data sets that it is measured on.
    """

    family: str
    name: str
    recipe: Recipe
    sets: tuple[str, ...]

    def of_seed(self, seed: int) -> Recipe:
        """The same with another seed."""
        return self.recipe.model_copy(update={"seed": seed})

    def folder(self, below: Path, seed: int) -> Path:
        """Where it is made."""
        return below / self.family / f"{self.name}-seed-{seed}"


def arms(
    families: Sequence[str],
    recipes: Sequence[str],
    corpora: Mapping[Path, Corpus],
    changes: Mapping[str, str],
    *,
    passages: int | None,
    packages: Sequence[str] = FULL.public,
) -> Iterator[Arm]:
    """All arms, `align` first.

    Args:
        recipes: ready ones, for the family `recipes`.
        corpora: the data sets by their folders.
        changes: settings laid over every recipe.
        passages: most passages that are learned from of each set; None for all.
        packages: whose docstrings and documentation are read.

    Raises:
        SettingsError: a family or a recipe is unknown.
    """
    if unknown := [family for family in families if family not in FAMILIES]:
        raise SettingsError(f"family {unknown[0]!r} is unknown: choose among {', '.join(FAMILIES)}")
    names = tuple(corpus.name for corpus in corpora.values())
    for family in families:
        if family == "recipes":
            for name in sorted(recipes, key=lambda name: name != BASE):
                recipe = _on(
                    load_recipe(name, dict(changes)), corpora, labelled=True, passages=passages, packages=packages
                )
                yield Arm(family=family, name=name, recipe=recipe, sets=names)
        else:
            base = load_recipe(BASE, dict(changes))
            outs = corpora if family == "left-out" else {None: None}
            for out, corpus in outs.items():
                others = {folder: one for folder, one in corpora.items() if folder != out} if out else {}
                yield Arm(
                    family=family,
                    name=corpus.name if corpus else BASE,
                    recipe=_on(base, others, every=corpora, out=out, passages=passages, packages=packages),
                    sets=(corpus.name,) if corpus else names,
                )


def _on(
    recipe: Recipe,
    learned: Mapping[Path, Corpus],
    *,
    passages: int | None,
    packages: Sequence[str],
    every: Mapping[Path, Corpus] | None = None,
    out: Path | None = None,
    labelled: bool = False,
) -> Recipe:
    """The recipe on docstrings and these sets; a recipe without sources of its own, as data-free is, stays without."""
    if not recipe.data.sources:
        return recipe
    sources = [SourceSettings(kind="docstrings", packages=tuple(packages))]
    if not labelled and out is not None:
        sources.append(SourceSettings(kind="documentation", use="passages", packages=tuple(packages)))
    for folder, corpus in learned.items():
        pairs = bool(corpus.queries_in("train"))
        if pairs or not labelled:
            use = "pairs" if pairs else "passages"
            sources.append(SourceSettings(kind="beir", data=str(folder), use=use, passages=passages))
    exclude = ExcludeSettings(folders=tuple(every or learned))
    data = DataSettings.model_validate({**recipe.data.model_dump(), "sources": sources, "exclude": exclude})
    return recipe.model_copy(update={"data": data})
