"""Open a teacher by its settings, or say what is wrong with what they name.

| named | as | what happens |
|---|---|---|
| "offline" | bi-encoder, late interaction | all-MiniLM-L6-v2 from its package |
| a model without a trained scoring head | cross-encoder | refused: `stillroom distill teach` trains one |
| a cross-encoder | bi-encoder, late interaction | refused: its token vectors were never trained to be compared |
| an ordinary Sentence Transformers model | late interaction | its normalised token vectors, without a projection |
| a ColBERT of Sentence Transformers, PyLate or Stanford | late interaction | as it was saved |
| a ColBERT | bi-encoder, cross-encoder | refused |
| nothing that is there | any | refused |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sentence_transformers
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util import load_file_path

from stillroom_server.distillery.teachers.base import Teacher
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.bm25 import Bm25
from stillroom_server.distillery.teachers.cross_encoder import CrossEncoder
from stillroom_server.distillery.teachers.late_interaction import LateInteraction, token_model
from stillroom_server.distillery.teachers.loading import load_model
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.teachers.teacher_set import Member, TeacherSet
from stillroom_server.teacher import folder_of
from stillroom_shared.errors import SettingsError
from stillroom_shared.scales import Normalisation

_LATE = ("MultiVectorEncoder", "ColBERT", "HF_ColBERT")


def open_teacher(settings: TeacherSettings, *, passages: Iterable[str] | None = None) -> Teacher:
    """The teacher that the settings name.

    Args:
        settings: its kind, model and knobs.
        passages: the text that BM25's statistics are of; the others leave it unread.

    Raises:
        SettingsError: there is no such model, it is of another kind, or BM25 got no passages.
    """
    if settings.kind == "bm25":
        if passages is None:
            raise SettingsError("teacher bm25 was opened without passages: its statistics are of the corpus, give it")
        return Bm25(passages, settings)
    said = model_type(folder_of(settings.model))
    openers: dict[str, Callable[[TeacherSettings, str], Teacher]] = {
        "bi-encoder": _bi_encoder,
        "cross-encoder": _cross_encoder,
        "late-interaction": _late_interaction,
    }
    return openers[settings.kind](settings, said)


def open_teachers(
    settings: Sequence[TeacherSettings],
    *,
    passages: Callable[[], Iterable[str]] | None = None,
    normalisation: Normalisation = "standard",
    always: bool = False,
) -> Teacher:
    """One teacher as it is, or several as a `TeacherSet`; `passages` gives the corpus anew for each that asks.

    Args:
        always: one teacher is a set too, so that its scores are on the scale of several.
    """
    opened = [open_teacher(one, passages=passages() if passages and one.kind == "bm25" else None) for one in settings]
    if len(opened) == 1 and not always:
        return opened[0]
    members = [Member(teacher, one.weight, one.temperature) for teacher, one in zip(opened, settings, strict=True)]
    return TeacherSet(members, normalisation)


def model_type(place: str) -> str:
    """What a model was saved as: a Sentence Transformers type, or that of a transformer's architecture, or ""."""
    saved = _json(place, "config_sentence_transformers.json").get("model_type")
    architectures = _json(place, "config.json").get("architectures") or [""]
    if architectures[0] == "HF_ColBERT" or saved in _LATE:
        return "MultiVectorEncoder"
    if saved == "CrossEncoder" or architectures[0].endswith("ForSequenceClassification"):
        return "CrossEncoder"
    return str(saved or architectures[0])


def _json(place: str, name: str) -> dict[str, Any]:
    try:
        path = load_file_path(place, name)
        with open(path or "", encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
            return found
    except (OSError, ValueError):
        return {}


def _bi_encoder(settings: TeacherSettings, said: str) -> Teacher:
    if said in ("CrossEncoder", "MultiVectorEncoder"):
        raise _refusal(settings, f"it is a {said}: name its own kind")
    return BiEncoder(load_model(SentenceTransformer, settings.model, device=settings.device), settings)


def _cross_encoder(settings: TeacherSettings, said: str) -> Teacher:
    if said and said != "CrossEncoder" and not said.endswith("ForCausalLM"):
        raise _refusal(settings, f"it is a {said} without a scoring head: train one with `stillroom distill teach`")
    return CrossEncoder(
        load_model(sentence_transformers.CrossEncoder, settings.model, device=settings.device), settings
    )


def _late_interaction(settings: TeacherSettings, said: str) -> Teacher:
    if said == "CrossEncoder":
        raise _refusal(settings, f"it is a {said}: name its own kind")
    if said == "MultiVectorEncoder" or said.endswith("ForRetrieval"):
        return LateInteraction(load_model(MultiVectorEncoder, settings.model, device=settings.device), settings)
    return LateInteraction(
        token_model(load_model(SentenceTransformer, settings.model, device=settings.device)), settings
    )


def _refusal(settings: TeacherSettings, what: str) -> SettingsError:
    return SettingsError(f"teacher {settings.model!r} cannot be opened as {settings.kind}: {what}")
