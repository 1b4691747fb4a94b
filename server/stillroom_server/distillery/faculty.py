"""The teachers of a run, each opened once, when something is first asked of it.

| case | what happens |
|---|---|
| model `taught` | the cross-encoder that the stage `teach` left in the folder of results |
| bm25 before there are lessons | refused by `open_teacher`: its statistics are of their passages |
| a bi-encoder whose token vectors are learned | opened as late interaction, without a projection |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.recipe import TAUGHT, Recipe
from stillroom_server.distillery.teachers.base import Teacher
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.late_interaction import token_model
from stillroom_server.distillery.teachers.opening import open_teacher
from stillroom_server.distillery.teachers.settings import TeacherSettings


@dataclass(frozen=True, eq=False)
class Faculty:
    """Who teaches.

    Attributes:
        recipe: names them.
        out: the folder of results, where lessons and what was taught lie.
    """

    recipe: Recipe
    out: Path

    def settings_of(self, name: str) -> TeacherSettings:
        """Its settings, with the folder of the model that was taught first."""
        settings = self.recipe.teachers[name]
        return settings.model_copy(update={"model": str(self.out / "taught")}) if settings.model == TAUGHT else settings

    def teacher(self, name: str) -> Teacher:
        """A teacher of the recipe. Raises `SettingsError` when it cannot be opened."""
        if name not in self._opened:
            settings, lessons = self.settings_of(name), self.out / "lessons"
            passages = None
            if settings.kind == "bm25" and lessons.exists():
                found = Lessons.open(lessons)
                passages = found.texts(found.rows("passage"))
            self._opened[name] = open_teacher(settings, passages=passages)
        return self._opened[name]

    def model(self, name: str) -> Any:
        """The model of a teacher that has one."""
        return cast(Any, self.teacher(name)).model

    @property
    def embedder(self) -> BiEncoder:
        """The teacher of `documents`."""
        return cast(BiEncoder, self.teacher(cast(str, self.recipe.documents)))

    @property
    def miner(self) -> Teacher | None:
        """The teacher that finds hard negatives: one with vectors, else one that scores what words find."""
        names = [self.recipe.documents, *self.recipe.teachers]
        found = {name: self.recipe.teachers[name] for name in names if name}
        # BM25 finds what any of them scores, and needs no teacher for it.
        usable = [name for name, one in found.items() if one.model != TAUGHT and one.kind != "bm25"]
        ordered = sorted(usable, key=lambda name: found[name].kind != "bi-encoder")
        return self.teacher(ordered[0]) if ordered else None

    @property
    def tokens(self) -> MultiVectorEncoder | None:
        """Whose token vectors are learned; None where no loss reads any."""
        name = self.recipe.token_teacher
        model = None if name is None else self.model(name)
        return token_model(model) if isinstance(model, SentenceTransformer) else model

    @cached_property
    def _opened(self) -> dict[str, Teacher]:
        return {}
