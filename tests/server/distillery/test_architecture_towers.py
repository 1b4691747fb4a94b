"""What an architecture search asks of towers: latency beside the teacher's, a short alignment, held-out queries."""

from __future__ import annotations

import os
import signal
import tomllib
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import nDCG
from sentence_transformers import SentenceTransformer

from stillroom_server.distillery.architecture.latency import Latency, in_turns
from stillroom_server.distillery.architecture.proxy import Alignment, ndcg
from stillroom_server.distillery.architecture.run import search_architecture
from stillroom_server.distillery.architecture.settings import ArchitectureSettings
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.size import size_of
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Release

TEXT = "open close read write zip tar file list members sort search index passage query tapir eats leaves river"
WORDS = TEXT.split()
SETTINGS = ArchitectureSettings(
    depth=(1, 2), width=(16, 32), heads=(2,), feed_forward=(32,), trials=2, texts=60, queries=20, evaluations=2,
    epochs=4, seed=1,
)  # fmt: skip
BASE = StudentSettings(tokens=16, freeze_embeddings=False)
STUDENT = StudentSettings(
    init="scratch", depth=1, width=16, heads=2, feed_forward=32, tokens=16, freeze_embeddings=False
)
DEEP = STUDENT.model_copy(update={"depth": 6, "width": 32, "feed_forward": 512})
TRAINING = TrainingSettings(batch_size=8, learning_rate=1e-2, bfloat16="off", save_minutes=60)


class Told:
    """A report that keeps what it is told, and stops at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: dict[int, float] = {}
        self.figures: dict[str, float] = {}
        self._stop_at = stop_at

    def __call__(self, step: int, value: float) -> bool:
        self.steps[step] = value
        return step == self._stop_at

    def note(self, **figures: float) -> None:
        self.figures |= figures


@pytest.fixture(scope="module")
def teacher(tiny_release: Release) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_release.folder / "document"), device="cpu")


@pytest.fixture(scope="module")
def bank(teacher: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """80 queries, each with its own passage; every tenth passage is a query's text too."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("bank") / "lessons"
    with LessonsWriter(folder, candidates=2) as writer:
        source = writer.source("toy")
        for number in range(80):
            words = [WORDS[i] for i in generator.integers(0, len(WORDS), 9)]
            query = " ".join(words[:4])
            passages = [" ".join(words) + ".", query if number % 10 == 0 else f"{query} {number}"]
            rows = writer.texts(passages, "passage", source)
            writer.list(writer.text(query, "query", source), rows, [2, 0], source)
    lessons = Lessons.open(folder)
    vectors = teacher.encode(lessons.texts(slice(None)), normalize_embeddings=True, show_progress_bar=False)
    return Bank(lessons, np.asarray(vectors, np.float32))


def test_latency_is_a_ratio_that_a_busy_machine_does_not_move() -> None:
    """Guards against figures of two runs minutes apart, and means that one pause of the machine decides."""
    now, calls = [0.0], [0]

    def takes(seconds: float) -> None:
        calls[0] += 1
        slow = 10.0 if 60 < calls[0] < 120 else 1.0  # a neighbour wakes up and goes to sleep
        now[0] += seconds * slow + (5.0 if calls[0] % 17 == 0 else 0.0)  # and something takes the processor away

    found = in_turns(lambda _: takes(0.001), lambda _: takes(0.004), 10, blocks=9, clock=lambda: now[0])
    assert found == pytest.approx((0.25, 4.0), rel=1e-6)


def test_a_shape_is_measured_as_its_int8_file_runs(teacher: SentenceTransformer) -> None:
    """Guards against sizes of float32 files, a vocabulary that is not trimmed, and a ratio that is turned around."""
    latency = Latency(teacher, ["open the file", "tapir eats leaves"], WORDS, blocks=3)
    small = latency(STUDENT)
    deep = latency(DEEP)
    trimmed = latency(STUDENT.model_copy(update={"vocabulary": 105}))
    assert trimmed.bytes < small.bytes < deep.bytes < size_of(make_student(DEEP, teacher)).float32_bytes / 2
    assert deep.milliseconds > 1.5 * small.milliseconds > 0 < small.teacher_milliseconds
    assert deep.ratio == deep.milliseconds / deep.teacher_milliseconds > small.ratio
    with pytest.raises(DataError, match="no queries"):
        Latency(teacher, [])


def test_a_student_of_a_smaller_vocabulary_is_trimmed_to_it(teacher: SentenceTransformer) -> None:
    """Guards against a setting that is written into a recipe and makes no difference there."""
    whole = len(teacher.tokenizer.get_vocab())
    for size, kept in ((105, 105), (whole, whole), (None, whole)):
        student = make_student(STUDENT.model_copy(update={"vocabulary": size}), teacher, WORDS)
        assert len(student.tokenizer.get_vocab()) == kept
    with pytest.raises(DataError, match="no texts"):
        make_student(STUDENT.model_copy(update={"vocabulary": 105}), teacher)


def test_ndcg_is_that_of_trec_eval() -> None:
    """Guards against another discount, gains that are squared, and a rank that is off by one."""
    generator = np.random.default_rng(3)
    scores = generator.standard_normal((20, 40)).astype(np.float32)
    places = np.stack([generator.choice(40, 5, replace=False) for _ in range(20)])
    grades = generator.integers(0, 3, (20, 5)).astype(np.int8)
    grades[:, 0] = 1
    scores[np.arange(20), places[:, 0]] += 2
    qrels = [
        ir_measures.Qrel(str(query), str(place), int(grade))
        for query in range(20)
        for place, grade in zip(places[query], grades[query], strict=True)
    ]
    run = [
        ir_measures.ScoredDoc(str(query), str(place), float(scores[query, place]))
        for query in range(20)
        for place in range(40)
    ]
    theirs = {one.query_id: one.value for one in ir_measures.iter_calc([nDCG @ 10], qrels, run)}
    np.testing.assert_allclose(ndcg(scores, places, grades), [theirs[str(query)] for query in range(20)], atol=1e-6)
    tied = ndcg(np.ones((1, 3), np.float32), np.array([[2]]), np.array([[1]], np.int8))
    np.testing.assert_allclose(tied, [0.5])


def test_no_trial_learns_from_the_queries_that_judge_it(
    teacher: SentenceTransformer, bank: Bank, tmp_path: Path
) -> None:
    """Guards against a search that rewards memory: a held-out query's text may be a passage too."""
    many = SETTINGS.model_copy(update={"texts": 10_000})
    proxy = Alignment(teacher, bank, many, TRAINING, tmp_path)
    held = set(bank.lessons.texts(proxy.held_out.rows))
    assert len(held) == 20 and not held & set(proxy.texts)
    assert held & set(bank.lessons.texts(bank.lessons.rows("passage"))), "the trap must be there"
    assert len(proxy.texts) == len(set(proxy.texts)) > 100
    assert set(bank.lessons.queries[proxy.held_out.lists]) == set(proxy.held_out.rows)
    few = Alignment(teacher, bank, SETTINGS, TRAINING, tmp_path)
    assert len(few.texts) == 60 and few.texts != proxy.texts
    learned = few._curriculum.bank
    again = teacher.encode(learned.lessons.texts(slice(None)), normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(learned.vectors_of(np.arange(60)).numpy(), again, atol=1e-5)
    with pytest.raises(DataError, match="vectors"):
        Alignment(teacher, Bank(bank.lessons), SETTINGS, TRAINING, tmp_path)


def test_a_trial_learns_is_judged_on_the_way_and_can_be_stopped(
    teacher: SentenceTransformer, bank: Bank, tmp_path: Path
) -> None:
    """Guards against a proxy that says what an untrained student would say, and training that a stop does not end."""
    proxy = Alignment(teacher, bank, SETTINGS, TRAINING, tmp_path)
    report, untrained = Told(), Told()
    quality = proxy(STUDENT, report)  # type: ignore[arg-type]  # all that it uses of a report
    before = proxy._evaluated(make_student(STUDENT, teacher, ()), untrained)  # type: ignore[arg-type]
    assert quality > before + 0.1 and report.figures["cosine"] > untrained.figures["cosine"] + 0.1
    assert quality == pytest.approx((report.figures["cosine"] + report.figures["ndcg_share"]) / 2)
    [(step, halfway)] = report.steps.items()
    assert step == 16 and before < halfway, "60 texts in batches of 8, 4 times, are 32 steps"
    often, saving = SETTINGS.model_copy(update={"evaluations": 8}), TRAINING.model_copy(update={"save_minutes": 1e-9})
    stopped, shorter = Told(stop_at=4), Alignment(teacher, bank, often, saving, tmp_path)
    assert np.isnan(shorter(STUDENT, stopped))  # type: ignore[arg-type]
    assert set(stopped.steps) == {4} and list(tmp_path.rglob("curves"))
    assert not list(tmp_path.rglob("checkpoint-*")), "nobody goes on from a trial that is over"


def test_an_interrupt_of_a_trial_that_is_stopped_ends_the_search(
    teacher: SentenceTransformer, bank: Bank, tmp_path: Path
) -> None:
    """Guards against a search that goes on to its next trial after Ctrl-C."""

    class Interrupted(Told):
        def __call__(self, step: int, value: float) -> bool:
            os.kill(os.getpid(), signal.SIGINT)
            return True

    proxy = Alignment(teacher, bank, SETTINGS, TRAINING, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        proxy(STUDENT, Interrupted())  # type: ignore[arg-type]


def test_a_tower_is_found_and_written_as_a_recipe_takes_it(
    teacher: SentenceTransformer, bank: Bank, tmp_path: Path
) -> None:
    """Guards against parts that each work: figures of one shape beside the quality of another."""
    found = search_architecture(SETTINGS, BASE, tmp_path, teacher=teacher, bank=bank, training=TRAINING)
    assert [trial.state for trial in found.trials] == ["trained", "trained"]
    table = tomllib.loads((tmp_path / "architecture.toml").read_text())["student"]
    assert StudentSettings.model_validate({**table}) == found.best.student
    assert set(found.best.figures) == {"cosine", "ndcg_share"}
    with pytest.raises(SettingsError, match=r"subject.training.batch_size was 8 and is 4"):
        other = TRAINING.model_copy(update={"batch_size": 4})
        search_architecture(SETTINGS, BASE, tmp_path, teacher=teacher, bank=bank, training=other)


@pytest.mark.parametrize(
    ("change", "base", "words"),
    [
        ({"width": (32, 64)}, {}, "width 64 is above the teacher's 32"),
        ({"vocabulary": (99_999,)}, {}, "vocabulary 99999 is above"),
        ({}, {"kind": "static"}, "static"),
    ],
)
def test_what_the_teacher_does_not_allow_is_refused_before_anything_is_measured(
    teacher: SentenceTransformer,
    bank: Bank,
    tmp_path: Path,
    change: dict[str, object],
    base: dict[str, object],
    words: str,
) -> None:
    """Guards against a search that fails hours later, at the first shape that cannot be."""
    with pytest.raises(SettingsError, match=words):
        search_architecture(
            SETTINGS.model_copy(update=change),
            BASE.model_copy(update=base),
            tmp_path,
            teacher=teacher,
            bank=bank,
            training=TRAINING,
        )
    assert not list(tmp_path.iterdir())
