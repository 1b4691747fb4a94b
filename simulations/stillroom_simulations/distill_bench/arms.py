"""What is compared, read from `studies.toml`: each arm is a recipe with settings laid over it, on some text.

| `text` | learned from | the arm is |
|---|---|---|
| `docstrings` | packages alone: docstrings; where limits say so documentation, WordNet, questions of its words | one model |
| `labelled` | docstrings, and the train queries of the data sets with their passages | one model |
| `others` | packages, and all that is public of the other data sets | a model for each set, measured on it |

A recipe without sources of its own, as data-free is, stays without. Whatever the text, queries that any set is measured on are
taken out of it (`data.exclude`). Settings of the command line win over those of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stillroom_server.distillery.data.settings import DataSettings, ExcludeSettings, SourceSettings
from stillroom_server.distillery.recipe import TAUGHT, Recipe, load_recipe
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.docstrings import FULL
from stillroom_shared.asked import pairs
from stillroom_shared.corpus import Corpus
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings_file import Group, load
from stillroom_shared.workspace import key_of

STUDIES = Path(__file__).with_name("studies.toml")
TRAINED = ("recipes", "left-out", "docstrings", "matryoshka", "teachers", "rerank")
"""Families of arms."""
FAMILIES = (*TRAINED, "memory", "rates")
Family = Literal["recipes", "left-out", "docstrings", "matryoshka", "teachers", "rerank"]
Text = Literal["docstrings", "labelled", "others"]
How = Literal["torch", "float32", "int8"]
_BEGUN = "begun"
"""Name, among a recipe's teachers, of the model that it goes on from."""


class Learning(Group):
    """What is made of what."""

    recipe: str = Field("align", description="ready recipe that it is based on, or a file")
    settings: tuple[str, ...] = Field((), description="laid over the recipe, each as after --set: KEY=VALUE")
    text: Text = Field("docstrings", description="what it learns from; see the table of `arms.py`")
    docstrings: int | None = Field(None, ge=0, description="most queries of docstrings; 0: none are read; none: all")
    documentation: int = Field(0, ge=0, description="most passages of installed documentation; 0: none are read")
    wordnet: int = Field(0, ge=0, description="most definitions of WordNet, where it is installed; 0: none are read")
    questions: int = Field(0, ge=0, description="questions that are made about its words; 0: none are")
    queries: int | None = Field(None, ge=1, description="most queries of each data set")
    passages: int | None = Field(None, ge=0, description="most passages of each data set beside those of its queries")


class ArmSettings(Learning):
    """One thing that is compared."""

    family: Family = Field("recipes", description="what it stands beside")
    name: str = Field("", pattern="^[a-z0-9-]*$", description="its name there, in small letters, digits and hyphens")
    model_of: str = Field(
        "", description="FAMILY.NAME of an arm before it, whose models are measured in place of its own"
    )
    taught: str | None = Field(None, description="cross-encoder under [taught] that stands for the model `taught`")
    continues: str = Field(
        "", description="FAMILY.NAME of an arm before it, of one model: the student goes on from that of the same seed"
    )
    sets: tuple[str, ...] = Field((), description="data sets that it is measured on; empty: all")
    how: tuple[How, ...] = Field(
        ("torch",), min_length=1, description="by what it is run; figures of quality are those of the first"
    )
    cut: tuple[int, ...] = Field((), description="lengths that vectors are cut to, on both sides")
    untrained: bool = Field(False, description="measure the student as it was before training too")
    first: str = Field("offline", description="first stage of a reranker, as `stillroom evaluate` names it")
    top: int = Field(100, ge=1, description="passages of the first stage that a reranker reads")
    most: int | None = Field(None, ge=2, description="most queries of each set that it is measured on; none: all")
    above: tuple[str, ...] = Field((), description="arms of the family that it should be better than")
    above_on: int | None = Field(None, ge=1, description="on at least so many sets; none: on their mean")


class MemorySettings(Group):
    """How memory is measured."""

    texts: tuple[int, ...] = Field((10_000, 100_000, 1_000_000), min_length=2, description="sizes of the corpus")
    steps: int = Field(50, ge=1, description="of training")
    # What grows is numbers in arrays; texts, keys, vectors and objects of Python must not. Of a passage and its query:
    # Preparing holds 12 bytes of each text (its new row of 8, role, source, whether it is kept), of their list 19 (two rows,
    # source, grade) and 27 as a judgement (two rows, where it begins, source, grade): 70. While judgements are sorted, rows of
    # pairs stand in three orders of 16 and two of 8 instead of those of texts: 110.
    # Training holds the role and length of each text (10), of what is learned from its row (8), that row and its length as a
    # data set (12), and a random order (8): 38, and 16 while lengths are counted. Laying out holds a row of each text and,
    # role by role, once more: 26.
    preparing: float = Field(
        128.0,
        gt=0,
        description="goal: most bytes that preparing grows by for a passage and the query that is made of it",
    )
    learning: float = Field(64.0, gt=0, description="goal: the same of laying out their vectors, and of training")


class RateSettings(Group):
    """How rates of training are measured."""

    sentences: int = Field(5_000, ge=1, description="texts that both ways train on")
    repeats: int = Field(3, ge=1, description="times that both ways are run, in turns")


class Studies(Group):
    """The file."""

    taught: dict[str, Learning] = Field(default_factory=dict, description="cross-encoders that are taught once")
    families: dict[str, ArmSettings] = Field(
        default_factory=dict,
        description="what the arms of a family share, unless they say otherwise; settings come before theirs",
    )
    arms: tuple[ArmSettings, ...] = Field((), description="what is compared")
    memory: MemorySettings = MemorySettings()
    rates: RateSettings = RateSettings()


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is made and measured.

    Attributes:
        settings: of the file.
        recipe: on its text, of seed 0; `taught` still stands for the cross-encoder that it names.
        sets: names of the data sets that it is measured on.
        out: set that is left out of its text, where it is made for one.
        maker: the arm that makes the model, which is its own but for `model_of`.
        continues: the arm whose model it goes on from.
    """

    settings: ArmSettings
    recipe: Recipe
    sets: tuple[str, ...]
    out: str | None
    maker: ArmSettings
    continues: Arm | None = None

    @property
    def title(self) -> str:
        """Family and name, as figures begin."""
        return f"{self.settings.family}.{self.settings.name}"

    @property
    def digest(self) -> str:
        """Changes with all that its figures depend on beside seeds and data."""
        own = [one.model_dump(mode="json") for one in (self.settings, self.maker)]
        # Where data lie is another thing on every machine; which they are is said by their hashes.
        before = [self.continues.digest] if self.continues else []
        return key_of(own, self.recipe.model_dump(mode="json", exclude={"data": {"sources", "exclude"}}), *before)

    def of_seed(self, seed: int, taught: Mapping[str, Path], begun: Path | None = None) -> Recipe:
        """With a seed, with the folder of the cross-encoder in place of the word for it, and with the model it goes on from."""
        folder = taught[self.maker.taught] if self.maker.taught else TAUGHT
        teachers = {
            name: one.model_copy(update={"model": str(folder)}) if one.model == TAUGHT else one
            for name, one in self.recipe.teachers.items()
        }
        changes: dict[str, Any] = {"seed": seed, "teachers": teachers}
        if begun is not None:
            depth = self.recipe.student.student_depth
            whole = self.recipe.student.model_copy(update={"init": "layers", "layers": tuple(range(depth))})
            changes |= {"begins": _BEGUN, "scorers": self.recipe.scoring, "student": whole}
            changes["teachers"] = teachers | {_BEGUN: TeacherSettings(model=str(begun))}
        return self.recipe.model_copy(update=changes)

    def folder(self, below: Path, seed: int) -> Path:
        """Where it is made."""
        name = self.maker.name if self.out is None else f"{self.maker.name}-without-{self.out}"
        return below / self.maker.family / f"{name}-seed-{seed}"


@dataclass(frozen=True, kw_only=True)
class Public:
    """Text that may be learned from.

    Attributes:
        corpora: the data sets by their folders.
        packages: whose docstrings and documentation are read.
        passages: most passages of each set, whatever an arm says; None leaves it to the arm.
    """

    corpora: Mapping[Path, Corpus]
    packages: Sequence[str] = FULL.public
    passages: int | None = None

    def recipe(self, learning: Learning, changes: Mapping[str, str], *, out: Path | None = None) -> Recipe:
        """What `learning` names, with its settings, then `changes`, on its text; `out` is left out."""
        recipe = load_recipe(learning.recipe, {**pairs(learning.settings), **changes})
        if not recipe.data.sources:
            return recipe
        sources = [*self._packaged(learning), *self._sets(learning, out)]
        data = DataSettings.model_validate(
            {**recipe.data.model_dump(), "sources": sources, "exclude": ExcludeSettings(folders=tuple(self.corpora))}
        )
        return recipe.model_copy(update={"data": data})

    def _packaged(self, learning: Learning) -> Iterator[SourceSettings]:
        packages = tuple(self.packages)
        if learning.docstrings != 0:
            # A limit of queries keeps the passages that they need, and no others.
            passages = None if learning.docstrings is None else 0
            yield SourceSettings(kind="docstrings", packages=packages, queries=learning.docstrings, passages=passages)
        if limit := learning.documentation:
            yield SourceSettings(kind="documentation", use="passages", packages=packages, passages=limit)
        if learning.wordnet:
            yield SourceSettings(kind="wordnet", use="queries", queries=learning.wordnet)
        if learning.questions:
            yield SourceSettings(kind="questions", use="queries", queries=learning.questions)

    def _sets(self, learning: Learning, out: Path | None) -> Iterator[SourceSettings]:
        passages = learning.passages if self.passages is None else self.passages
        for folder, corpus in self.corpora.items():
            pairs_there = bool(corpus.queries_in("train"))
            if folder == out or learning.text == "docstrings" or (learning.text == "labelled" and not pairs_there):
                continue
            yield SourceSettings(
                kind="beir",
                data=str(folder),
                use="pairs" if pairs_there else "passages",
                queries=learning.queries if pairs_there else None,
                passages=passages,
            )


def load_studies(path: Path = STUDIES) -> Studies:
    """The file, checked.

    Raises:
        SettingsError: it cannot be read, two arms have one name, or one names an arm or a cross-encoder that is not there.
    """
    studies = load(Studies(), path, {})
    if lost := {*studies.families} - {*TRAINED}:
        raise SettingsError(f"{path}: [families.{min(lost)}] is of no family: {', '.join(TRAINED)} have arms")
    studies = studies.model_copy(update={"arms": tuple(_shared(one, studies.families) for one in studies.arms)})
    known: set[str] = set()
    for arm in studies.arms:
        title = f"{arm.family}.{arm.name}"
        if not arm.name or title in known:
            raise SettingsError(f"{path}: arm {title!r} needs a name that no other of its family has")
        if arm.model_of and arm.model_of not in known:
            raise SettingsError(f"{path}: arm {title} measures models of {arm.model_of!r}, which is no arm before it")
        if arm.continues and arm.continues not in known:
            raise SettingsError(f"{path}: arm {title} continues {arm.continues!r}, which is no arm before it")
        if arm.taught is not None and arm.taught not in studies.taught:
            raise SettingsError(f"{path}: arm {title} is taught by {arm.taught!r}: add a table [taught.{arm.taught}]")
        for other in arm.above:
            if f"{arm.family}.{other}" not in known:
                raise SettingsError(f"{path}: arm {title} is compared with {other!r}, which is no arm before it")
        known.add(title)
    return studies


def _shared(arm: ArmSettings, families: Mapping[str, ArmSettings]) -> ArmSettings:
    """The arm with what its family says of what the arm does not."""
    family = families.get(arm.family, ArmSettings())
    given = {name: getattr(family, name) for name in family.model_fields_set - arm.model_fields_set}
    if "above" in given:  # what all of a family are compared with is one of them
        given["above"] = tuple(other for other in family.above if other != arm.name)
    return arm.model_copy(update={**given, "settings": (*family.settings, *arm.settings)})


def arms(
    studies: Studies,
    families: Sequence[str],
    public: Public,
    changes: Mapping[str, str],
    *,
    names: Sequence[str] | None = None,
) -> Iterator[Arm]:
    """The arms of these families, in the order of the file; one for each set where a set is left out.

    Args:
        changes: settings laid over every recipe.
        names: of arms; None for all.

    Raises:
        SettingsError: a family, an arm, a recipe or a set is unknown.
    """
    if unknown := [family for family in families if family not in FAMILIES]:
        raise SettingsError(f"family {unknown[0]!r} is unknown: choose among {', '.join(FAMILIES)}")
    if lost := {*(names or ())} - {arm.name for arm in studies.arms if arm.family in families}:
        raise SettingsError(f"arm {min(lost)!r} is in none of {', '.join(families)}: see {STUDIES.name}")
    by_title = {f"{one.family}.{one.name}": one for one in studies.arms}
    for settings in studies.arms:
        if settings.family in families and (names is None or settings.name in names):
            yield from _made(settings, by_title, public, changes)


def _made(
    settings: ArmSettings, by_title: Mapping[str, ArmSettings], public: Public, changes: Mapping[str, str]
) -> Iterator[Arm]:
    every = {corpus.name: folder for folder, corpus in public.corpora.items()}
    if unknown := [name for name in settings.sets if name not in every]:
        raise SettingsError(
            f"{settings.family}.{settings.name} is measured on {unknown[0]!r}, which --data does not give: add it, "
            "or leave the family out"
        )
    sets = settings.sets or tuple(every)
    maker = by_title[settings.model_of] if settings.model_of else settings
    before = [*_made(by_title[maker.continues], by_title, public, changes)] if maker.continues else []
    if len(before) > 1:
        raise SettingsError(
            f"{maker.family}.{maker.name} continues {maker.continues}, which has a model for each set that is left out: "
            "continue an arm of one model"
        )
    for out in sets if maker.text == "others" else (None,):
        recipe = public.recipe(maker, changes, out=every[out] if out else None)
        yield Arm(
            settings=settings,
            recipe=recipe,
            sets=(out,) if out else sets,
            out=out,
            maker=maker,
            continues=before[0] if before else None,
        )
