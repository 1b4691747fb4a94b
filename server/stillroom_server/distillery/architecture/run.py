"""The search for a tower in a teacher's space: measured by `Latency`, judged by `Alignment`.

OUT/search.db            the trials; the same call goes on from them
OUT/trials/              checkpoints of a trial that was interrupted, and curves
OUT/architecture.json    settings, all trials, the Pareto front
OUT/architecture.toml    the best shape as the table `[student]` of a recipe
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer

from stillroom_server.distillery.architecture.latency import Latency
from stillroom_server.distillery.architecture.proxy import Alignment
from stillroom_server.distillery.architecture.result import Architecture
from stillroom_server.distillery.architecture.search import Progress, search
from stillroom_server.distillery.architecture.settings import ArchitectureSettings
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import SettingsError
from stillroom_shared.processor import processor_name
from stillroom_shared.workspace import key_of

_TIMED_QUERIES = 24


def search_architecture(
    settings: ArchitectureSettings,
    base: StudentSettings,
    out: Path,
    *,
    teacher: SentenceTransformer,
    bank: Bank,
    training: TrainingSettings,
    texts: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> Architecture:
    """Find the best shape of a tower on this machine, and write it.

    Args:
        base: the student, whose shape is what is searched for.
        teacher: a bi-encoder; latencies are over its own.
        bank: public lessons with this teacher's vectors of all their texts. Trials align a student on some of their
            queries, and compare students on others.
        training: how the student will be trained; a trial takes its batches and rates.
        texts: those whose tokens a trimmed vocabulary keeps, as `make_student` will be given them; none: those of trials.
        progress: called with shapes trained so far, and `trials`.

    Raises:
        SettingsError: a choice that the teacher does not allow, nothing within the bounds, or `out` holds another search.
        DataError: the lessons have no vectors, or too few queries.
        KeyboardInterrupt: the same call goes on.
    """
    _check(settings, base, teacher)
    proxy = Alignment(teacher, bank, settings, training, out / "trials", texts)
    queries = bank.lessons.texts(proxy.held_out.rows[:_TIMED_QUERIES])
    vectors = bank.vectors_of(proxy.held_out.rows).numpy()
    found = search(
        settings,
        base,
        out,
        measure=Latency(teacher, queries, proxy.counted),
        proxy=proxy,
        subject={
            "lessons": bank.lessons.identity,
            "vectors": hashlib.sha256(vectors.tobytes()).hexdigest(),
            "texts": key_of(*texts) if settings.vocabulary else None,
            "training": training.model_dump(mode="json"),
            "processor": processor_name(),
        },
        progress=progress,
    )
    found.write(out)
    return found


def _check(settings: ArchitectureSettings, base: StudentSettings, teacher: SentenceTransformer) -> None:
    config = bert_of(teacher).config
    if base.kind != "tower":
        raise SettingsError(f"student.kind is {base.kind}: shapes are searched for towers")
    if base.embeddings == "teacher" and settings.width[-1] > config.hidden_size:
        raise SettingsError(
            f"architecture.width {settings.width[-1]} is above the teacher's {config.hidden_size}: leave it out, or set "
            "student.embeddings to random and student.freeze_embeddings to false"
        )
    if settings.vocabulary and settings.vocabulary[-1] > config.vocab_size:
        raise SettingsError(
            f"architecture.vocabulary {settings.vocabulary[-1]} is above the teacher's {config.vocab_size}: leave it out"
        )
