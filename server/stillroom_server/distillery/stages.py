"""The stages of a recipe: which it has, in which order, what each leaves in the folder of results, and when it is stale.

lessons   public text, made queries, filter, negatives          OUT/lessons
teach     a cross-encoder is fine-tuned, where a teacher is it  OUT/taught
vectors   of texts that are read, by the teacher of `documents` OUT/vectors.npy
rotate    to the principal directions, where that is asked for  OUT/rotated.npy, OUT/rotation.npz, OUT/documents
scores    of all lists, by the teachers of `scorers`            OUT/scores.npy
search    the student's shape, where the recipe searches it     OUT/search
train     the student, and pruning with training in between     OUT/student, OUT/training
export    ONNX files, sizes, sources, the document tower        OUT/model, OUT/model/distillation.json
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from stillroom_server.distillery.data.sources import content_of, source_key
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.losses.needs import needs
from stillroom_server.distillery.recipe import TAUGHT, Recipe
from stillroom_server.distillery.training.reading import OF_TEXTS
from stillroom_server.teacher import OFFLINE
from stillroom_shared.workspace import key_of

STAGES: Mapping[str, float | None] = MappingProxyType(
    {
        "lessons": 60.0,
        "teach": None,
        "vectors": None,
        "rotate": None,
        "scores": None,
        "search": None,
        "train": None,
        "export": 30.0,
    }
)
"""Seconds that each takes, roughly; None: it depends on the lessons (`expected`)."""
_A_SECOND: Mapping[str, float] = MappingProxyType(
    {"teach": 15.0, "vectors": 150.0, "rotate": 50_000.0, "scores": 60.0, "train": 400.0}
)
"""Pairs, texts or reads of a text that a stage does in a second, a guess for small models on two cores: this machine's pace,
and a stage's own rate once it runs, correct it."""
_RANKING = 60.0
"""Seconds in which a rotation comes to rank, however many lessons there are."""
OUTPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lessons": ("lessons",),
        "teach": ("taught",),
        "vectors": ("vectors.npy",),
        "rotate": ("rotated.npy", "rotation.npz", "documents"),
        "scores": ("scores.npy",),
        "search": ("search",),
        "train": ("student", "training"),
        "export": ("model",),
    }
)
"""Below the folder of results; removed when what the stage depends on has changed."""
IN_ONE_PROCESS = frozenset({"teach", "search"})
"""Stages with trainers of their own, which under several processes would wait for steps of those that wait for the stage."""


def planned(recipe: Recipe) -> list[str]:
    """The stages of a recipe, in order."""
    wanted = {
        "teach": recipe.teaches_first,
        "vectors": bool(recipe.embedded),
        "rotate": recipe.rotate,
        "scores": recipe.learns_scores,
        "search": recipe.searches,
    }
    return [name for name in STAGES if wanted.get(name, True)]


def expected(recipe: Recipe, lessons: Lessons) -> dict[str, float]:
    """Seconds of the stages whose work lessons decide, roughly. Unknown (None) stays how long a search takes."""
    listed = lessons.lists * lessons.candidates
    own = recipe.student.kind in ("tower", "static")
    reads = 1 if own and recipe.training.towers == "query" else 1 + lessons.candidates
    found, both = needs(recipe.losses), recipe.training.towers == "both"
    texts = len(lessons) if both else len(lessons.rows("query"))
    learned = (texts if own else 0) + (lessons.lists * reads if found - OF_TEXTS or not own else 0)
    rounds = 1 + (recipe.pruning.steps if recipe.pruning.active else 0)
    amounts = {
        "teach": listed * recipe.teach.epochs,
        "vectors": len(lessons.rows_of(*recipe.embedded)),
        "rotate": 2 * len(lessons),
        "scores": listed * len(recipe.scoring),
        "train": learned * recipe.training.epochs * rounds,
    }
    seconds = {name: amount / _A_SECOND[name] for name, amount in amounts.items()}
    if recipe.losses.matryoshka.dims:
        seconds["rotate"] += _RANKING
    return seconds


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """The key of each planned stage: it changes with all that its result depends on, the stages before it included."""
    said = recipe.model_dump(mode="json")
    teachers = said["teachers"]
    # What decides how scores meet, and how fast they come, changes neither negatives nor vectors.
    apart = {"weight", "temperature", "batch_size", "device", "token_cache_mib"}
    minds = {one: {k: v for k, v in teachers[one].items() if k not in apart} for one in teachers}
    tokens = [recipe.token_teacher] if recipe.token_teacher else []
    own: dict[str, Any] = {
        "lessons": [said["data"], said["seed"], recipe.documents, minds, _contents(recipe)],
        "teach": said["teach"],
        "vectors": [minds, recipe.documents, recipe.embedded],
        "rotate": [said["rotate"], said["losses"]["matryoshka"]["dims"]],
        "scores": [teachers, recipe.scoring, recipe.normalisation, recipe.normalises_one],
        "search": [said[part] for part in ("architecture", "student", "training", "seed")],
        "train": [*(said[part] for part in ("student", "losses", "training", "pruning", "seed", "begins")), *tokens],
        "export": said["compress"],
    }
    keys: dict[str, str] = {}
    before = ""
    for name in planned(recipe):
        before = keys[name] = key_of(name, before, own[name])
    return keys


def _contents(recipe: Recipe) -> list[str]:
    """Changes when a file that the recipe names does: of data, of teachers, of models that write or are taught."""
    data = recipe.data
    models = [data.synthetic.model, data.datafree.model, recipe.teach.model]
    models += [one.model for one in recipe.teachers.values()]
    named = [*map(str, data.exclude.folders), *(name for name in models if name not in ("", OFFLINE, TAUGHT))]
    return [*map(source_key, data.sources), *map(content_of, named)]
