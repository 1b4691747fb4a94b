"""A recipe's stages, each skipped while nothing that it depends on has changed. `stages.py` lists them.

Vectors and scores are kept by content in the cache too, so another run with the same teachers computes only what is new. Under
`accelerate launch` or `torchrun` the first process prepares while the others wait, all of them train, and the first writes;
what one alone can do (`IN_ONE_PROCESS`) has to be done before.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from stillroom_server.distillery.architecture.run import search_architecture
from stillroom_server.distillery.arrays import open_array
from stillroom_server.distillery.data.prepare import prepare_lessons
from stillroom_server.distillery.early import refuse_early
from stillroom_server.distillery.exporting import DOCUMENTS, FACTS, export_model
from stillroom_server.distillery.faculty import Faculty
from stillroom_server.distillery.lessons import ROLES, Lessons
from stillroom_server.distillery.losses.needs import scales
from stillroom_server.distillery.recipe import Recipe
from stillroom_server.distillery.rotation import (
    Rotation,
    document_tower,
    least_ranked,
    rotate_array,
    rotated_model,
    rotated_tokens,
)
from stillroom_server.distillery.scores import ScoreCache, score_lessons
from stillroom_server.distillery.stages import IN_ONE_PROCESS, OUTPUTS, expected, planned, stage_keys
from stillroom_server.distillery.students.importance import Texts
from stillroom_server.distillery.students.iterate import prune_iteratively
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.size import size_of
from stillroom_server.distillery.succession import succeeded
from stillroom_server.distillery.teachers.opening import open_teachers
from stillroom_server.distillery.teaching import teach
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.train import Student, processes
from stillroom_server.distillery.vectors import VectorCache, embed_lessons
from stillroom_shared.errors import SettingsError
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.workspace import Workspace

_COUNTED_TEXTS = 50_000
"""Texts in which tokens are counted."""
_EXPORT_TEXTS = 1_024
"""Queries that files are compared and calibrated on."""
_TOLD = (64, 128, 256)
"""First values of a rotated space whose share of squared length is told, beside those of `losses.matryoshka`."""


@dataclass(frozen=True, eq=False)
class Run:
    """A recipe on its way through its stages.

    Attributes:
        recipe: what is made.
        out: the folder of results; the same one again resumes.
        cache: folder of scores and vectors by content, shared by runs.
    """

    recipe: Recipe
    out: Path
    cache: Path

    def all_stages(self, progress: Progress, *, last: str | None = None) -> Path:
        """Run what is not done, `last` being the last stage where it is named. Returns the folder of the model.

        Raises:
            KeyboardInterrupt: it was interrupted, and goes on when it is called again.
            SettingsError: the student could not be trained in the end (`early.py`), the folder holds something of a name that
                a stage would write and none has made, or several processes run and a stage that takes one is not done; nothing
                is changed.
            StillroomError: a stage cannot do its work, with the remedy.
        """
        works: dict[str, Callable[[Stage], None]] = {
            "lessons": self._prepare,
            "teach": self._teach,
            "vectors": self._embed,
            "rotate": self._rotate,
            "scores": self._score,
            "search": self._search,
            "train": self._train,
            "export": self._export,
        }
        if last is None or last in ("train", "export"):
            refuse_early(self.recipe)  # of what can only fail there
        stages = planned(self.recipe)
        stages = stages[: stages.index(last) + 1] if last in stages else stages
        self._refuse_processes(stages)
        self._space.check({name: OUTPUTS[name] for name in stages})
        for name in stages:
            with progress.stage(name) as stage:
                skipped = self._stage(name, lambda stage=stage, name=name: works[name](stage))  # type: ignore[misc]
                stage.note(self._remark(name), cached=skipped)
                if name == "lessons":
                    progress.expect(expected(self.recipe, self.lessons))
        return self.out / "model"

    def untrained(self) -> Student:
        """The student as training begins with it, after the stages before are done: what a recipe is compared with."""
        return self._new_student()

    def _refuse_processes(self, stages: Sequence[str]) -> None:
        if (together := processes().num_processes) == 1:
            return
        left = [one for one in stages if one in IN_ONE_PROCESS and not Workspace(self.out).done(one, self._keys[one])]
        if left:
            raise SettingsError(
                f"{together} processes, and {' and '.join(left)} can only be done by one: run the recipe in one process, "
                "without torchrun or accelerate launch; several may train it anew once that is done"
            )

    def _stage(self, name: str, work: Callable[[], None]) -> bool:
        """Run a stage unless it is done: in the first process while others wait, or in all of them for training."""
        state = processes()
        if not state.is_main_process:
            if name == "train" and _agreed(None):
                work()
            state.wait_for_everyone()
            return False

        def together() -> None:
            if name == "train":
                _agreed(True)
            work()

        skipped = self._space.stage(name, self._keys[name], OUTPUTS[name], together)
        if name == "train" and skipped:
            _agreed(False)
        state.wait_for_everyone()
        return skipped

    def _prepare(self, stage: Stage) -> None:
        data = self.recipe.data
        data = data.model_copy(update={"seed": data.seed + self.recipe.seed})
        cache = VectorCache(self.cache)
        prepare_lessons(data, self.out / "lessons", teacher=self._faculty.miner, cache=cache, progress=stage)

    def _teach(self, stage: Stage) -> None:
        teach(self.lessons, self.recipe.teach, self.out / "taught", progress=stage)

    def _embed(self, stage: Stage) -> None:
        rows = self.lessons.rows_of(*self.recipe.embedded)
        embed_lessons(
            self._faculty.embedder, self.lessons, VectorCache(self.cache), self.out / "vectors.npy", stage, rows=rows
        )

    def _rotate(self, stage: Stage) -> None:
        vectors = open_array(self.out / "vectors.npy")
        dims = self.recipe.losses.matryoshka.dims
        begins, ends = (0.1, 0.9) if dims else (0.5, 0.5)  # of ranking, which takes a minute, the others seconds
        rotation = Rotation.of(vectors, stage.part(0, begins))
        rotation = rotation.ranked(vectors, dims, seed=self.recipe.seed, progress=stage.part(begins, ends))
        rotation.save(self.out / "rotation.npz")
        rotate_array(rotation, vectors, self.out / "rotated.npy", stage.part(ends, 1))
        shutil.rmtree(self.out / DOCUMENTS, ignore_errors=True)
        embedder = self._faculty.embedder
        tower = document_tower(embedder.model, embedder.settings, rotation)
        tower.save_pretrained(str(self.out / DOCUMENTS), create_model_card=False)

    def _score(self, stage: Stage) -> None:
        lessons = self.lessons
        together = open_teachers(
            [self._faculty.settings_of(name) for name in self.recipe.scoring],
            passages=lambda: lessons.texts(lessons.rows("passage")),
            normalisation=self.recipe.normalisation,
            always=self.recipe.normalises_one,
        )
        score_lessons(together, lessons, ScoreCache(self.cache), self.out / "scores.npy", progress=stage)

    def _search(self, stage: Stage) -> None:
        found = search_architecture(
            self.recipe.architecture,
            self._seeded(self.recipe.student),
            self.out / "search",
            teacher=self._cut_from(cast(str, self.recipe.documents)),
            bank=self._curriculum.bank,
            training=self.recipe.training,
            texts=self._counted,
            progress=stage,
        )
        best = found.best.student
        stage.note(f"{len(found.trials)} shapes, best: {best.depth} layers of {best.width}, {best.heads} heads")

    def _train(self, stage: Stage) -> None:
        student = self._new_student()
        self._learned(self._curriculum, student, self.out / "training", stage)
        if self.recipe.pruning.active:
            student = self._pruned(student, stage)
        if processes().is_main_process:
            student.save_pretrained(str(self.out / "student"), create_model_card=False)

    def _learned(self, curriculum: Curriculum, student: Student, folder: Path, stage: Stage) -> None:
        """Train in place. Where pruning follows, what came of it is kept: the next step must begin from the same weights."""
        kept = folder / "learned.pt"
        if kept.exists():
            student.load_state_dict(torch.load(kept, weights_only=True))
            student.train(False)
            return
        curriculum.learn(student, folder, progress=stage)
        if self.recipe.pruning.active:
            if processes().is_main_process:
                torch.save(student.state_dict(), partial := kept.with_suffix(".partial"))
                partial.replace(kept)
            processes().wait_for_everyone()

    def _export(self, stage: Stage) -> None:
        model, student = self.out / "model", load_student(self.out / "student", self.recipe)
        shutil.rmtree(model, ignore_errors=True)
        queries = self.lessons.texts(self.lessons.rows("query")[:_EXPORT_TEXTS])
        files = export_model(student, model, self.recipe.compress, queries)
        described = {
            "recipe": self.recipe.model_dump(mode="json", exclude_defaults=True),
            "lessons": self.lessons.description,
            "teachers": {name: self._faculty.teacher(name).identity for name in self.recipe.teachers},
            "size": asdict(size_of(student)),
            "files": files,
        }
        if self.recipe.rotate:
            shutil.copytree(self.out / DOCUMENTS, model / DOCUMENTS)
            described["rotation"] = {"share_of_squared_length": self._shares}
        (model / FACTS).write_text(json.dumps(described, indent=1, default=str) + "\n")

    @cached_property
    def lessons(self) -> Lessons:
        """What is learned from."""
        return Lessons.open(self.out / "lessons")

    @property
    def _curriculum(self) -> Curriculum:
        recipe, rotated = self.recipe, self.recipe.rotate
        compared = recipe.documents and recipe.losses.compares_layers
        return Curriculum(
            losses=recipe.losses,
            training=recipe.training,
            bank=Bank(
                self.lessons,
                self._said("rotate", "rotated") if rotated else self._said("vectors", "vectors"),
                self._said("scores", "scores"),
            ),
            teacher=self._faculty.embedder.model if compared else None,
            tokens=self._tokens,
            seed=recipe.seed,
        )

    @property
    def _tokens(self) -> MultiVectorEncoder | None:
        """Whose token vectors are learned, if any are; turned as the vectors of `documents` are, to lie to them as before."""
        tokens = self._faculty.tokens
        return rotated_tokens(tokens, self._rotation) if tokens is not None and self.recipe.rotate else tokens

    def _said(self, stage: str, name: str) -> NDArray[Any] | None:
        """What that stage wrote; a file of a stage that is not asked for is another recipe's, of other lessons."""
        return open_array(self.out / f"{name}.npy") if stage in planned(self.recipe) else None

    def _new_student(self) -> Student:
        settings = self._seeded(self.recipe.student)
        if self.recipe.searches:
            found = tomllib.loads((self.out / "search" / "architecture.toml").read_text())
            settings = StudentSettings.model_validate(found["student"])
        return make_student(settings, self._cut_from(self.recipe.origin), self._counted)

    def _cut_from(self, name: str) -> Any:
        """The model that a student begins from; that of `documents` in the space that its vectors are in."""
        model = self._faculty.model(name)
        turned = self.recipe.rotate and name == self.recipe.documents
        return rotated_model(model, self._rotation) if turned else model

    @property
    def _rotation(self) -> Rotation:
        return Rotation.open(self.out / "rotation.npz")

    @property
    def _shares(self) -> dict[str, float]:
        """Of squared length, by the first values that hold it."""
        return self._rotation.shares([*_TOLD, *self.recipe.losses.matryoshka.dims])

    @property
    def _unranked(self) -> str:
        """That a rotation stayed at principal directions, where it was to come to rank."""
        values, texts = len(self._rotation.lengths), len(self.lessons.rows_of(*self.recipe.embedded))
        asked = min((values, *self.recipe.losses.matryoshka.dims)) < values
        few = asked and texts < least_ranked(values)
        return f"principal directions: {least_ranked(values)} texts could be ranked, {texts} cannot" if few else ""

    def _seeded(self, settings: StudentSettings) -> StudentSettings:
        return settings.model_copy(update={"seed": settings.seed + self.recipe.seed})

    @cached_property
    def _counted(self) -> Sequence[str]:
        """Texts whose tokens a static table counts and a smaller vocabulary keeps; none where neither is asked for."""
        student = self.recipe.student
        asked = (
            student.kind == "static"
            or student.vocabulary
            or (self.recipe.searches and self.recipe.architecture.vocabulary)
        )
        return self.lessons.texts(slice(0, _COUNTED_TEXTS)) if asked else ()

    def _pruned(self, student: Student, stage: Stage) -> Student:
        """The student after pruning, each step followed by training in a folder of its own."""
        steps, recipe = count(), self.recipe

        def again(pruned: Student, teacher: Any) -> Student:
            curriculum, folder = self._curriculum, self.out / "training" / f"pruned-{next(steps)}"
            if recipe.pruning.teaches_itself:
                roles = ROLES if recipe.training.towers == "both" else ROLES[:1]
                [scale] = scales(recipe.losses) or {1.0}
                bank = succeeded(teacher, curriculum.bank, folder, roles=roles, scale=scale, progress=stage)
                curriculum = replace(curriculum, bank=bank)
            self._learned(curriculum, pruned, folder, stage)
            return pruned

        texts, targets = self._measured()
        pruned = prune_iteratively(cast(Any, student), self.recipe.pruning, again, texts=texts, targets=targets)
        return cast(Student, pruned)

    def _measured(self) -> tuple[Texts, NDArray[np.float32] | None]:
        """What a student reads while importance is measured, and what `taylor` compares its answers with.

        Queries beside their vectors, (texts, dim); for a reranker the pairs of the first lists beside their scores, (pairs,),
        as its losses read them.
        """
        lessons, bank, most = self.lessons, self._curriculum.bank, self.recipe.pruning.texts
        taylor = self.recipe.pruning.criterion == "taylor"
        if self.recipe.student.kind != "reranker":
            rows = lessons.rows("query")[:most]
            found = np.asarray(bank.vectors[rows], np.float32) if taylor and bank.vectors is not None else None
            return lessons.texts(rows), found
        first = slice(0, -(-most // lessons.candidates))
        asked = np.repeat(lessons.queries[first], lessons.candidates)[:most]
        pairs = list(zip(lessons.texts(asked), lessons.texts(lessons.passages[first].ravel()[:most]), strict=True))
        if not taylor or bank.scores is None:
            return pairs, None
        [scale] = scales(self.recipe.losses)
        return pairs, np.asarray(bank.scores[first], np.float32).ravel()[:most] / np.float32(scale)

    @cached_property
    def _faculty(self) -> Faculty:
        return Faculty(self.recipe, self.out)

    @cached_property
    def _space(self) -> Workspace:
        self.out.mkdir(parents=True, exist_ok=True)
        return Workspace(self.out)

    @cached_property
    def _keys(self) -> Mapping[str, str]:
        return stage_keys(self.recipe)

    def _remark(self, name: str) -> str:
        if name == "lessons":
            found = self.lessons
            return f"{len(found):,} texts, {found.lists:,} lists of {found.candidates}"
        if name == "rotate":
            held = ", ".join(f"{share:.0%} in {count}" for count, share in self._shares.items())
            return "; ".join(filter(None, (f"squared length: {held}" if held else "", self._unranked)))
        return ""


def _agreed(value: bool | None) -> bool:
    """What the first process says, in every process."""
    said = [value]
    broadcast_object_list(said)
    return bool(said[0])


def load_student(folder: Path, recipe: Recipe) -> Student:
    """The student that a recipe made, from the folder that it was saved to."""
    kinds: dict[str, type] = {"reranker": CrossEncoder, "late-interaction": MultiVectorEncoder}
    kind = kinds.get(recipe.student.kind, SentenceTransformer)
    return cast(Student, kind(str(folder), device="cpu", local_files_only=True))
