"""From what `stillroom distill run` made to a signed release that devices take: the query tower, its documents, what it read.

The query tower is the student's, the document tower that of the teacher in whose space it learned to place queries; where both
towers learned, the student's serves for both. `sources.json` says which public text they learned from, with licences, versions
and hashes, and the manifest's table of files covers it: nobody changes it unnoticed, and versions before leave it unread. Paths
of this machine stay here.

| case | what happens |
|---|---|
| a model without `distillation.json` | its document tower is to be named; `sources.json` says that its text is not known |
| a last linear map (`rotate`, narrow), other shapes, static, late interaction | `ReleaseError`: devices train plain BERTs |
| a vocabulary that was trimmed, or another tokenizer | `ReleaseError`: one tokenizer serves both towers |
| prompts, or a pooling that is not the mean | `ReleaseError`: devices know neither |
| a document tower of another space | `ReleaseError`: the mean cosine of a few texts in both is told |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.exporting import FACTS
from stillroom_server.distillery.recipe import Recipe
from stillroom_server.distillery.students.export import folded
from stillroom_server.distillery.teachers.loading import load_model
from stillroom_server.publish import publish_first
from stillroom_server.rerankers import export_reranker
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import SOURCES_NAME, Release
from stillroom_shared.settings import AdapterSettings
from stillroom_shared.signing import SigningKey

_PROBES = (
    "how do I open a file for reading",
    "what are the symptoms of a fever",
    "the river bank in spring",
    "list of the members of an archive",
    "why does bread rise",
    "effects of heat on a thin wing",
)
_LEAST_COSINE = 0.5
"""Mean over the probes. Students of three layers have 0.9 beside their teacher; towers of two teachers are near 0."""


def create_release(
    model: Path,
    out: Path,
    *,
    key: SigningKey,
    documents: str | None = None,
    reranker: Path | None = None,
    adapter: AdapterSettings | None = None,
) -> Release:
    """Write, seal and verify a release of a distilled query tower.

    Args:
        model: what a recipe left in `model/`, or any Sentence Transformers model.
        documents: its document tower, by folder or name; None for what the recipe says.
        reranker: a cross-encoder that the release brings, as a recipe or `stillroom distill teach` left it.
        adapter: of the part of the query tower that learns in rounds.

    Raises:
        ReleaseError: the models are none that devices run and train, or do not belong together; nothing is left at `out`.
        SettingsError: there is no such model.
    """
    made = _Distilled(model)
    query = _Side.of(str(model), "query tower")
    named = documents or made.documents
    passages = query if named == str(model) else _Side.of(named, "document tower")
    if passages is not query:
        _refuse_apart(query, passages)

    def extras(folder: Path) -> None:
        write_sources(folder, made.sources, teachers=made.teachers, lessons=made.lessons)
        if reranker is not None:
            scorer = load_model(CrossEncoder, str(reranker), device="cpu", local_files_only=True)
            export_reranker(scorer, folder, tokens=int(scorer.max_seq_length or 256))

    return publish_first(
        out,
        query_tower=query.tower,
        document_tower=passages.tower,
        tokenizer=query.tokenizer,
        adapter=adapter or AdapterSettings(),
        key=key,
        query_tokens=query.tokens,
        document_tokens=made.passage_tokens or passages.tokens,
        extras=extras,
    )


def write_sources(
    folder: Path,
    sources: Sequence[Mapping[str, Any]] | None,
    *,
    teachers: Mapping[str, str] | None = None,
    lessons: str | None = None,
) -> None:
    """Write `sources.json` into a release that is not sealed yet.

    Args:
        sources: names with what is known about each; None where nobody knows.
        teachers: hashes of the models that taught, by name.
        lessons: hash of the text as it was learned from.
    """
    said = {"schema_version": 1, "sources": sources, "teachers": dict(teachers or {}), "lessons": lessons}
    (folder / SOURCES_NAME).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Distilled:
    """What a recipe says of the model that it made."""

    folder: Path

    @cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / FACTS).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ReleaseError(f"{self.folder / FACTS} cannot be read ({error}): distil the model again") from error
        return found

    @cached_property
    def _recipe(self) -> Recipe | None:
        return Recipe.model_validate(self._facts["recipe"]) if self._facts else None

    @property
    def documents(self) -> str:
        """Whose vectors passages have."""
        recipe = self._recipe
        if recipe is None:
            raise ReleaseError(
                f"{self.folder} has no {FACTS}, which says whose vectors passages have: name the document tower "
                "(--documents), which may be the model itself"
            )
        if recipe.rotate:
            raise ReleaseError(
                f"{self.folder} was made with rotate: its towers end with a linear map, which devices do not have; distil "
                "without it, or run the model from its ONNX files"
            )
        alone = recipe.documents is None or recipe.training.towers == "both"
        return str(self.folder) if alone else recipe.teachers[recipe.documents or ""].model

    @property
    def passage_tokens(self) -> int | None:
        """Tokens of a passage that were read, if fewer than the document tower can."""
        recipe = self._recipe
        return recipe.teachers[recipe.documents].passage_tokens if recipe and recipe.documents else None

    @property
    def sources(self) -> list[dict[str, Any]] | None:
        """The public text that was learned from; of a model that wrote some of it the name, not where it lies."""
        if not self._facts:
            return None
        found = [(one["name"], dict(one["facts"])) for one in self._facts["lessons"]["sources"]]
        return [
            {"name": name, "facts": facts | ({"model": Path(facts["model"]).name} if "model" in facts else {})}
            for name, facts in found
        ]

    @property
    def teachers(self) -> dict[str, str]:
        """Hashes of the teachers."""
        return dict(self._facts.get("teachers", {}))

    @property
    def lessons(self) -> str | None:
        """Hash of the lessons."""
        return self._facts["lessons"]["hash"] if self._facts else None


@dataclass(frozen=True, eq=False)
class _Side:
    """A model as one of the two towers."""

    name: str
    model: SentenceTransformer
    tower: BertModel
    tokenizer: PreTrainedTokenizerFast
    tokens: int

    @classmethod
    def of(cls, name: str, what: str) -> _Side:
        """Opened, and found to be one that devices can run."""
        model = load_model(SentenceTransformer, name, device="cpu", local_files_only=Path(name).is_dir())
        if prompts := [prompt for prompt in model.prompts.values() if prompt]:
            raise ReleaseError(
                f"the {what} {name} puts {prompts[0]!r} before a text: devices have no prompts, distil without them"
            )
        tower = folded(model)
        return cls(
            name, model, tower, model.tokenizer, int(model.max_seq_length or tower.config.max_position_embeddings)
        )


def _refuse_apart(query: _Side, passages: _Side) -> None:
    """Raises `ReleaseError` when two towers cannot stand in one release."""
    if query.tokenizer.get_vocab() != passages.tokenizer.get_vocab():
        raise ReleaseError(
            f"{query.name} and {passages.name} have different vocabularies, and one tokenizer serves both towers of a release: "
            "distil without student.vocabulary, from the model that passages are embedded by"
        )
    left, right = (
        one.model.encode(list(_PROBES), normalize_embeddings=True, show_progress_bar=False) for one in (query, passages)
    )
    if left.shape[1] != right.shape[1]:
        raise ReleaseError(
            f"{query.name} gives vectors of {left.shape[1]} values and {passages.name} of {right.shape[1]}: name the document "
            "tower that it was distilled for (--documents)"
        )
    if (cosine := float(np.mean(np.sum(left * right, axis=1)))) < _LEAST_COSINE:
        raise ReleaseError(
            f"{query.name} does not place queries where {passages.name} places passages (mean cosine {cosine:.2f} of texts in "
            "both): name the document tower that it was distilled for (--documents)"
        )
