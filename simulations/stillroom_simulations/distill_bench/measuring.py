"""Make an arm of a seed, and measure it on its data sets.

    FOLDER/teachers/NAME/taught                a cross-encoder that is taught once and shared
    FOLDER/teachers/NAME/shipped, offline/     teachers with ONNX files, for those measured through ONNX Runtime
    FOLDER/FAMILY/NAME-seed-N/                 a recipe's run, resumed by itself
    .../untrained                              its student before training
    .../measured/FAMILY.NAME/SET.json          scores and milliseconds of each query, and bytes

What is measured stays while the files of its models, the queries, the way of measuring, the machine and its packages do.
Systems of one data set are timed in turns, in one process. Roles of systems are `ROLE HOW`:

| role | is |
|---|---|
| `student`, `untrained` | a tower over the document tower that it is for; what has no such tower, by itself |
| `teacher` | the bi-encoder of `documents`; without one, the cross-encoder or late-interaction model it is made from |
| `first` | what rerankers read again |

HOW is `torch`, `float32` or `int8` (both through ONNX Runtime), and `torch@128` where vectors are cut.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import CrossEncoder

from stillroom_server.distillery.compress.quantize import CompressSettings
from stillroom_server.distillery.exporting import DOCUMENTS, export_model
from stillroom_server.distillery.recipe import Recipe
from stillroom_server.distillery.run import Run
from stillroom_server.distillery.stages import STAGES, planned
from stillroom_server.teacher import folder_of, load_teacher
from stillroom_shared.corpus import Corpus
from stillroom_shared.progress import Progress
from stillroom_shared.scales import FIRST_SHARE
from stillroom_shared.workspace import Workspace, content_key, key_of
from stillroom_simulations.benchmark_file import machine, versions
from stillroom_simulations.distill_bench.arms import Arm, Public, Studies
from stillroom_simulations.evaluating.run import Choices, evaluate_models, queries_of
from stillroom_simulations.evaluating.values import OnSet

if TYPE_CHECKING:
    from rich.console import Console

METRIC = "ndcg_at_10"
_PROBES = 256


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where arms are made and measured.

    Attributes:
        public: text to learn from; its data sets are measured on.
        studies: the file.
        changes: settings laid over every recipe.
        timed: queries that are timed; 0 for none.
        folder: of the runs; the same again resumes.
        cache: of what teachers said.
    """

    public: Public
    studies: Studies
    changes: Mapping[str, str]
    timed: int
    folder: Path
    cache: Path
    console: Console

    def taught(self, name: str) -> Path:
        """The cross-encoder of that name, taught if it is not yet."""
        recipe = self.public.recipe(self.studies.taught[name], self.changes)
        self.console.print(f"teacher {name}: {self.folder / 'teachers' / name}", markup=False)
        run = self._run(recipe, self.folder / "teachers" / name, last="teach")
        return run.out / "taught"

    def made(self, arm: Arm, seed: int) -> Made:
        """The arm's model, made or resumed."""
        taught = {name: self.taught(name) for name in [arm.maker.taught] if name}
        begun = self.made(arm.continues, seed) if arm.continues else None
        recipe, folder = arm.of_seed(seed, taught, begun.model if begun else None), arm.folder(self.folder, seed)
        self.console.print(f"{arm.title}, seed {seed}: {folder}", markup=False)
        run = self._run(recipe, folder)
        if arm.settings.untrained and _stale(folder / "untrained", key := content_key(folder / "student")):
            run.untrained().save_pretrained(str(folder / "untrained"), create_model_card=False)
            (folder / "untrained" / "of.txt").write_text(key)
        return Made(arm=arm, recipe=recipe, folder=folder, teachers=self.folder / "teachers", begun=begun)

    def measured(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Seconds of making it by stage, and by set and role what was measured."""
        made = self.made(arm, seed)
        space = Workspace(made.folder / "measured" / arm.title)
        sets = {}
        for corpus in self.public.corpora.values():
            if corpus.name in arm.sets:
                corpus = _fewer(corpus, arm.settings.most)
                systems, file = made.systems(), f"{corpus.name}.json"
                # Milliseconds are of a machine, and scores and milliseconds of the packages that were run.
                way = [self.timed, arm.settings.first, arm.settings.top, machine(1), versions()]
                key = key_of(systems, made.identity, corpus.content_hash, way)
                work = partial(self._measure, arm, systems, corpus, space.folder / file)
                space.stage(corpus.name, key, [file], work)
                sets[corpus.name] = json.loads((space.folder / file).read_text())
        return {"seconds": self._seconds(arm, made), "sets": sets}

    def _seconds(self, arm: Arm, made: Made) -> dict[str, float]:
        """Of each stage that the recipe has; `teach` where the cross-encoder is shared, too: a recipe alone would teach it.

        What was done for the model that it goes on from counts as its own.
        """
        taken = Workspace(made.folder).seconds()
        before = self._seconds(made.begun.arm, made.begun) if made.begun else {}
        seconds = {name: taken[name] + before.get(name, 0.0) for name in planned(made.recipe) if name in taken}
        if arm.maker.taught:
            seconds["teach"] = Workspace(self.folder / "teachers" / arm.maker.taught).seconds()["teach"]
        return seconds

    def _measure(self, arm: Arm, systems: Mapping[str, str], corpus: Corpus, path: Path) -> None:
        settings = arm.settings
        choices = Choices(
            first_stage=settings.first, rerank=settings.top, timed=self.timed, metrics=(METRIC,), cache=self.cache / "evaluate"
        )  # fmt: skip
        # One system under two roles, as an untrained teacher's is, is measured once.
        names = list(dict.fromkeys(systems.values()))
        done = evaluate_models(names, [corpus], choices, console=self.console)
        found = dict(zip(names, done.sets[0].models, strict=True))
        values = {role: _described(done.sets[0], found[name].model) for role, name in systems.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def _run(self, recipe: Recipe, folder: Path, *, last: str | None = None) -> Run:
        run = Run(recipe, folder, self.cache / "distillery")
        run.all_stages(Progress({name: STAGES[name] for name in planned(recipe)}, console=self.console), last=last)
        return run


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model of an arm, and how `stillroom evaluate` names it and what stands beside it."""

    arm: Arm
    recipe: Recipe
    folder: Path
    teachers: Path
    begun: Made | None = None

    @property
    def model(self) -> Path:
        """What the recipe made."""
        return self.folder / "model"

    @cached_property
    def identity(self) -> list[str]:
        """Changes with the files of the models that are measured, wherever they lie."""
        folders = [self.model, self.folder / "untrained", Path(folder_of(self.teacher))]
        ranked_with: list[str] = []
        if self.recipe.student.kind == "reranker":
            folders.append(Path(folder_of(self.arm.settings.first)))
            ranked_with.append(str(FIRST_SHARE))
        return [*(content_key(one) for one in folders if one.is_dir()), *ranked_with]

    @property
    def teacher(self) -> str:
        """What the student is compared with: the model in whose space it lies, or that it is made from."""
        return self.recipe.teachers[self.recipe.documents or self.recipe.origin].model

    def systems(self) -> dict[str, str]:
        """Names by role."""
        settings, found = self.arm.settings, {}
        for how in settings.how:
            found[f"student {how}"] = self._named(self.model, how)
        if settings.untrained:
            found["untrained torch"] = self._named(self.folder / "untrained", "torch")
        found |= {f"student torch@{length}": self._named(self.model, "torch", cut=length) for length in settings.cut}
        if "torch" in settings.how:
            found["teacher torch"] = self.teacher
        if {"float32", "int8"} & {*settings.how} and self.recipe.student.kind != "late-interaction":
            found["teacher float32"] = self._teacher_through_onnx("float32")
        if "int8" in settings.how and self.recipe.documents:
            found["teacher int8"] = self._teacher_through_onnx("int8")
        if self.recipe.student.kind == "reranker":
            found["first torch"] = settings.first
        return found

    def _named(self, folder: Path, how: str, *, cut: int | None = None) -> str:
        return system_of(self.recipe, self.model, folder, "" if how == "torch" else f"@{how}", cut)

    def _teacher_through_onnx(self, how: str) -> str:
        """The teacher's queries by ONNX Runtime, its documents as they are; a cross-encoder whole."""
        cross, place = self.recipe.student.kind == "reranker", self.teachers / _label(self.teacher)
        folder = _shipped(Path(folder_of(self.teacher)), place, cross=cross)
        return f"{folder}@{how}" if cross else f"{folder}@{how}::{self.teacher}"


def system_of(
    recipe: Recipe, model: Path, student: Path | None = None, suffix: str = "", cut: int | None = None
) -> str:
    """How `stillroom evaluate` names what a recipe made: over the document tower that it is for, its own or the teacher's.

    >>> recipe = Recipe.model_validate({"teachers": {"large": {"model": "offline"}}, "documents": "large"})
    >>> system_of(recipe, Path("runs/a/model"), suffix="@int8", cut=128)
    'runs/a/model@int8@128::offline@128'

    Args:
        student: folder of another student for the same documents; None for the model's own.
        cut: length of vectors, on both sides.
    """
    asked, end = f"{student or model}{suffix}", "" if cut is None else f"@{cut}"
    if (model / DOCUMENTS).is_dir():
        return f"{asked}{end}::{model / DOCUMENTS}{end}"
    return f"{asked}{end}::{recipe.teachers[recipe.documents].model}{end}" if recipe.documents else f"{asked}{end}"


def _shipped(source: Path, target: Path, *, cross: bool) -> Path:
    """A teacher's folder with ONNX files, as a student's is written."""
    if _stale(target, key := content_key(source)):
        shutil.rmtree(target, ignore_errors=True)
        model = CrossEncoder(str(source), device="cpu", local_files_only=True) if cross else load_teacher(str(source))
        export_model(
            model, target, CompressSettings(), [f"text number {n} to compare files on" for n in range(_PROBES)]
        )
        (target / "of.txt").write_text(key)
    return target


def _label(teacher: str) -> str:
    """Folder of a teacher with ONNX files: `shipped` beside a taught one."""
    path = Path(teacher)
    return f"{path.parent.name}/shipped" if path.name == "taught" else path.name


def _stale(folder: Path, key: str) -> bool:
    """Whether a folder is not there, or was made of something else."""
    stamp = folder / "of.txt"
    return not stamp.is_file() or stamp.read_text() != key


def _fewer(corpus: Corpus, most: int | None) -> Corpus:
    """The corpus with so many of the queries that it is measured on, evenly from first to last."""
    asked = queries_of(corpus, None)
    if most is None or len(asked) <= most:
        return corpus
    kept = {asked[round(place)].id for place in np.linspace(0, len(asked) - 1, most)}
    left = tuple(query for query in corpus.queries if query.split != asked[0].split or query.id in kept)
    return replace(corpus, queries=left, qrels={query.id: corpus.qrels[query.id] for query in left})


def _described(on_set: OnSet, name: str) -> dict[str, Any]:
    measured = on_set.of(name)
    timed = measured.latency
    return {
        "queries": list(measured.scores.query_ids),
        "scores": measured.scores.of(METRIC).tolist(),
        "bytes": asdict(measured.bytes),
        "encode": None if timed is None else timed.encode.tolist(),
        "search": None if timed is None else timed.search.tolist(),
    }
