"""What of a recipe can only fail once the student is trained, refused before the first stage: teachers may work for hours.

Sizes come from the configuration files of teachers; no weights are opened. The losses are fitted by what fits them later too
(`training/fitting.py`), and the same words refuse them.

| case | what happens |
|---|---|
| a teacher whose files say no sizes, or none to be had now | what depends on its sizes is left for later |
| the student's shape is searched | the same of its layers; trials are ranked by vectors as long as those of `documents` |
| `student.vocabulary` not below the teacher's | nothing is trimmed, so nothing is refused |
| no source has judged queries and none are made | there will be no lists |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentence_transformers.util import load_file_path

from stillroom_server.distillery.losses.needs import scales
from stillroom_server.distillery.losses.settings import AttentionMapsSettings, HiddenStatesSettings, LossesSettings
from stillroom_server.distillery.recipe import TAUGHT, Recipe
from stillroom_server.distillery.students.towers import refuse_sizes
from stillroom_server.distillery.training.fitting import OTHER_VOCABULARY, Given, Shape, fitted, reads_tokens
from stillroom_server.teacher import folder_of
from stillroom_shared.errors import SettingsError

Config = dict[str, Any]


def refuse_early(recipe: Recipe) -> None:
    """Raises `SettingsError` for what can only fail at `train`, with the remedy."""
    _refuse_towerless(recipe)
    origin, documents, tokens = (
        _config_of(recipe, name) for name in (recipe.origin, recipe.documents, recipe.token_teacher)
    )
    _refuse_shapes(recipe, origin)
    _refuse_search(recipe, _dimension(documents))
    _refuse_targets(recipe, origin, documents)
    losses, settings = _judged(recipe, origin, documents), recipe.student
    if not any(losses.active()):
        return
    # Where a size is unknown, one that refuses nothing stands for it: for the teacher's, that of the student.
    unknown = max((*losses.matryoshka.dims, 0)) + 1
    said = settings.dimension or _dimension(origin)
    own = said or unknown
    space = (_dimension(documents) if said else None) or own
    lengths = {"reranker": 1, "late-interaction": settings.token_dimension}
    student = Shape(
        kind=settings.kind,
        dimension=lengths.get(settings.kind, own),
        layers=None if settings.kind == "static" else settings.student_depth,
        width=settings.width if settings.init == "scratch" else origin.get("hidden_size"),
    )
    given = Given(
        dimension=space if recipe.embedded else None,
        scores=recipe.learns_scores,
        candidates=1 + recipe.data.negatives.count if _has_lists(recipe) else None,
        layers=_layers(documents, space) if recipe.documents else None,
        tokens=Shape(kind="late-interaction", dimension=_token_dimension(recipe, tokens) or unknown)
        if recipe.token_teacher
        else None,
    )
    fitted(losses, recipe.training, student, given, seed=recipe.seed)


def _refuse_towerless(recipe: Recipe) -> None:
    pruning, static = recipe.pruning, recipe.student.kind == "static"
    if static and recipe.training.quantized:
        raise SettingsError(
            "training.quantized simulates a tower's int8, and a static student has none: set it to false"
        )
    if static and pruning.active:
        raise SettingsError(
            "pruning.heads, pruning.neurons and pruning.weights are of layers, and a static student has none: set them to 0"
        )


def _refuse_shapes(recipe: Recipe, origin: Config) -> None:
    student, kind = recipe.student, recipe.teachers[recipe.origin].kind
    embeds = student.kind in ("tower", "static")
    if embeds and kind != "bi-encoder":
        raise SettingsError(
            f"a {student.kind} student begins from a bi-encoder, and {recipe.origin!r} is a {kind}: name another in `begins`"
        )
    if student.kind == "static" and (width := _dimension(origin)):
        refuse_sizes(student, width=width, positions=0)
    if student.kind == "static" or not origin or recipe.searches:
        return
    if (said := origin.get("model_type")) != "bert":
        raise SettingsError(
            f"{recipe.origin!r} is a {said}: students are made of BERT towers only, name another in `begins`"
        )
    depth = origin["num_hidden_layers"]
    if student.init == "layers" and student.layers[-1] >= depth:
        raise SettingsError(f"student.layers {student.layers}: give ascending layer numbers from 0 to {depth - 1}")
    # A configuration that leaves positions out has those of any BERT.
    refuse_sizes(student, width=origin["hidden_size"], positions=origin.get("max_position_embeddings", 512))
    if (
        student.vocabulary is not None
        and student.vocabulary < origin["vocab_size"]
        and (recipe.losses.compares_layers or reads_tokens(recipe.losses))
    ):
        raise SettingsError(OTHER_VOCABULARY)


def _refuse_search(recipe: Recipe, space: int | None) -> None:
    own = recipe.student.dimension
    if recipe.searches and own and space and own != space:
        raise SettingsError(
            f"student.dimension is {own}, and a search ranks passages by vectors of `documents`, of {space} values: leave "
            "student.dimension out, or set searches to false"
        )


def _refuse_targets(recipe: Recipe, origin: Config, documents: Config) -> None:
    """Of `taylor`: it compares what the student says with what a teacher said of the same texts."""
    pruning, student = recipe.pruning, recipe.student
    if pruning.criterion != "taylor" or not max(pruning.heads, pruning.neurons):
        return
    own, space = student.dimension or _dimension(origin), _dimension(documents)
    told = sorted(scales(recipe.losses))
    if student.kind == "late-interaction":
        lacks = "vectors of texts or scores of pairs, and a late-interaction student has neither: choose another kind"
    elif student.kind == "reranker" and not recipe.learns_scores:
        lacks = "a teacher's scores, and no loss of this reranker reads any: give one a weight"
    elif student.kind == "reranker" and len(told) > 1:
        lacks = f"scores at one scale, and losses have student_scale {', '.join(f'{one:g}' for one in told)}: set them alike"
    elif student.kind == "tower" and recipe.documents is None:
        lacks = "a teacher's vectors: name their teacher as `documents`"
    elif student.kind == "tower" and own and space and own != space:
        lacks = (
            f"vectors of one length, and the student's have {own} values, those of `documents` {space}: make them alike"
        )
    else:
        return
    raise SettingsError(f"pruning.criterion is taylor, which needs {lacks}, or set it to sensitivity")


def _judged(recipe: Recipe, origin: Config, documents: Config) -> LossesSettings:
    """The losses of which enough is known to judge them."""
    known = (origin and documents) or not recipe.documents
    if known and not recipe.searches:
        return recipe.losses
    return recipe.losses.model_copy(
        update={"hidden_states": HiddenStatesSettings(), "attention_maps": AttentionMapsSettings()}
    )


def _has_lists(recipe: Recipe) -> bool:
    return bool(recipe.data.synthetic.makers) or any(source.use == "pairs" for source in recipe.data.sources)


def _layers(config: Config, dimension: int) -> Shape:
    bert = config.get("model_type") == "bert"
    sizes = (config["num_hidden_layers"], config["hidden_size"]) if bert else (None, None)
    return Shape(kind="tower", dimension=dimension, layers=sizes[0], width=sizes[1])


def _dimension(config: Config) -> int | None:
    """Of a model's vectors: what its last linear map gives, else its width."""
    lengths = [one["out_features"] for one in config.get("modules", ()) if "out_features" in one]
    found: int | None = lengths[-1] if lengths else config.get("hidden_size")
    return found


def _token_dimension(recipe: Recipe, config: Config) -> int | None:
    """The same of its token vectors; an ordinary model's are those of its tower, before any map."""
    late = recipe.teachers[recipe.token_teacher or ""].kind == "late-interaction"
    return _dimension(config) if late else config.get("hidden_size")


def _config_of(recipe: Recipe, name: str | None) -> Config:
    """What the files of a teacher say of its tower, and `modules` of what follows; empty where they say nothing."""
    if name is None or recipe.teachers[name].kind == "bm25":
        return {}
    model = recipe.teachers[name].model
    place = folder_of(recipe.teach.model if model == TAUGHT else model)
    modules = [one["path"] for one in _json(place, "modules.json") or ()]
    tower: Config = _json(place, str(Path(modules[0] if modules else "", "config.json"))) or {}
    if "hidden_size" not in tower:
        return {}
    return tower | {"modules": [_json(place, f"{path}/config.json") or {} for path in modules[1:]]}


def _json(place: str, name: str) -> Any:
    try:
        return json.loads(Path(load_file_path(place, name) or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
