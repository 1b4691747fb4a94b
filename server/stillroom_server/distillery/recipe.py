"""A recipe: everything a distilled model depends on, beside the code and the data, as one frozen value from a TOML file.

    [teachers.NAME]   who teaches; the file chooses the names (`teachers/settings.py`)
    documents         the teacher whose vectors passages keep, and in whose space the student's queries lie
    rotate            whether that space is turned first, for vectors that can be cut
    scorers           the teachers whose scores are learned
    begins            the teacher whose weights the student begins with
    [data] [teach] [student] [losses] [training] [pruning] [compress] [architecture]

Ready ones lie in `recipes/`; `stillroom distill recipes` lists them. Values after `--set` win.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from stillroom_server.distillery.architecture.settings import ArchitectureSettings
from stillroom_server.distillery.compress.quantize import CompressSettings
from stillroom_server.distillery.data.settings import DataSettings, SourceSettings
from stillroom_server.distillery.lessons import ROLES
from stillroom_server.distillery.losses.needs import needs, scales
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.students.settings import PruningSettings, StudentSettings
from stillroom_server.distillery.teachers.base import Role
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.teaching import TeachSettings
from stillroom_server.distillery.training.reading import embedded_roles, reads_scores
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import SettingsError
from stillroom_shared.scales import Normalisation
from stillroom_shared.settings_file import Group, load, reference

TAUGHT = "taught"
"""As the model of a teacher: the cross-encoder that the stage `teach` fine-tunes first."""


class Recipe(Group):
    """How one model is made."""

    about: str = Field("", description="what it is good for, in a line")
    teachers: dict[str, TeacherSettings] = Field(default_factory=dict, description="who teaches, by name")
    documents: str | None = Field(
        None, description="teacher whose vectors passages keep; none: the student's own, or none at all"
    )
    rotate: bool = Field(
        False,
        description="turn the space of `documents` to the principal directions of its vectors, then to those whose first "
        "`losses.matryoshka.dims` rank as all do; whole vectors compare as before",
    )
    scorers: tuple[str, ...] = Field((), description="teachers whose scores are learned; empty: all that are named")
    normalisation: Normalisation = Field("standard", description="how scores of several teachers meet, query by query")
    normalises_one: bool = Field(
        False,
        description="normalise the scores of a single teacher too, as those of several are: to compare it with them",
    )
    begins: str | None = Field(
        None, description="teacher that the student is cut from; none: `documents`, or the first"
    )
    data: DataSettings = DataSettings()
    teach: TeachSettings = TeachSettings()
    student: StudentSettings = StudentSettings()
    losses: LossesSettings = LossesSettings()
    training: TrainingSettings = TrainingSettings()
    pruning: PruningSettings = PruningSettings()
    compress: CompressSettings = CompressSettings()
    searches: bool = Field(False, description="find the student's shape first, as `architecture` says")
    architecture: ArchitectureSettings = ArchitectureSettings()
    seed: int = Field(0, ge=0, description="of everything; the seeds of single groups are added to it")

    @model_validator(mode="after")
    def _teachers_are_named(self) -> Self:
        named = {"documents": self.documents, "begins": self.begins} | {
            f"scorers[{i}]": s for i, s in enumerate(self.scorers)
        }
        for place, name in named.items():
            if name is not None and name not in self.teachers:
                raise ValueError(f"{place} is {name!r}: the teachers are {', '.join(self.teachers)}")
        if self.searches and (self.documents is None or self.student.kind != "tower"):
            raise ValueError(
                "searches: shapes of towers are compared in the space of `documents`: name it, and kind tower"
            )
        if self.rotate and (self.documents is None or self.student.kind not in ("tower", "static")):
            raise ValueError(
                "rotate: it is the space of `documents` that is turned, and a student of kind tower or static that lives in "
                "it: name `documents`, or leave rotate out"
            )
        if self.documents is not None and self.teachers[self.documents].kind != "bi-encoder":
            kind = self.teachers[self.documents].kind
            raise ValueError(
                f"documents {self.documents!r} is a {kind}: only a bi-encoder has a vector for each passage"
            )
        if self.teachers and self.teachers[self.origin].kind == "bm25":
            raise ValueError(f"the student would begin from {self.origin!r}, which is bm25: name another in `begins`")
        inside = self.losses.compares_layers or "teacher_tokens" in needs(self.losses)
        if self.pruning.teaches_itself and inside:
            raise ValueError(
                "pruning.teacher is pruned, and a loss compares layers or tokens, which are told of the first teacher: set it "
                "to original, or the weights of those losses to 0"
            )
        told = scales(self.losses)
        if self.pruning.teaches_itself and (len(told) > 1 or (told - {1.0} and self.training.ranked == "corpus")):
            raise ValueError(
                f"pruning.teacher is pruned, and losses have student_scale {', '.join(f'{one:g}' for one in sorted(told))}: "
                "a student's scores are told at one scale, and at 1 with training.ranked corpus: set them so, or teacher to "
                "original"
            )
        return self

    @property
    def origin(self) -> str:
        """The teacher that the student begins from."""
        return self.begins or self.documents or next(iter(self.teachers))

    @property
    def scoring(self) -> tuple[str, ...]:
        """The teachers whose scores are learned."""
        return self.scorers or tuple(self.teachers)

    @property
    def token_teacher(self) -> str | None:
        """The teacher whose token vectors are learned, if any are: a late-interaction one, else a bi-encoder."""
        names = [*self.scoring, *([self.documents] if self.documents else []), self.origin]
        kinds = [kind for kind in ("late-interaction", "bi-encoder") if "teacher_tokens" in needs(self.losses)]
        return next((one for kind in kinds for one in names if self.teachers[one].kind == kind), None)

    @property
    def learns_scores(self) -> bool:
        """Whether any loss reads scores that teachers give to lists; over the whole corpus they are products of vectors."""
        return reads_scores(self.losses, self.training)

    @property
    def embedded(self) -> tuple[Role, ...]:
        """Roles of the texts whose vectors, by the teacher of `documents`, any stage reads."""
        if self.documents is None:
            return ()
        if self.searches:  # trials are ranked over all passages
            return ROLES
        return embedded_roles(self.losses, self.training, self.student.kind)

    @property
    def teaches_first(self) -> bool:
        """Whether a cross-encoder is fine-tuned before anything is distilled."""
        return any(one.model == TAUGHT for one in self.teachers.values())


def load_recipe(name: str, overrides: dict[str, str]) -> Recipe:
    """A ready recipe by name, or a file, with values changed. Raises `SettingsError`."""
    path = Path(name)
    if path.suffix != ".toml" and name in ready():
        path = ready()[name]
    elif not path.is_file():
        raise SettingsError(f"recipe {name!r} is no file and no ready one: those are {', '.join(ready())}")
    recipe = load(Recipe(), path, overrides)
    if not recipe.teachers:
        raise SettingsError(f"{path} names no teacher: add a table, e.g. [teachers.minilm] with model = 'offline'")
    if not any(recipe.losses.active()):
        raise SettingsError(
            f"{path} gives no loss a weight, so nothing would be learned: e.g. losses.cosine.weight = 1"
        )
    return recipe


_INTRODUCTION = (
    "# Recipe settings",
    "",
    "`make docs` writes this page from the code. A recipe is a TOML file whose groups are tables; on the command line, write",
    "`--set losses.cosine.weight=1 --set student.layers=0,5`. `none` unsets a setting; `*` stands for a name of your choice,",
    "as in `[teachers.large]`. `data.sources` is a list of tables, `[[data.sources]]`; its keys stand at the end.",
)


def manual() -> str:
    """The page of the manual that lists every setting of a recipe."""
    sources = reference({"default": SourceSettings()}, ("", "# Keys of `[[data.sources]]`"))
    return reference({"default": Recipe()}, _INTRODUCTION) + "\n" + sources


def ready() -> dict[str, Path]:
    """The recipes that come with Stillroom, by name."""
    folder = Path(str(files("stillroom_server.distillery") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


if __name__ == "__main__":
    print(manual())
