"""Training: what a batch holds, which signals reach the losses, and that interruptions and processes change nothing."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from tests.references import distillation as slow
from tests.server.distillery.learners import CANDIDATES, DIM, in_two_processes, late, lessons, reranker, tower, unit
from torch import Tensor, nn

from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.losses.settings import LossesSettings, Weighted
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.students.vocabulary import trim_vocabulary
from stillroom_server.distillery.teachers.base import Role
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.batches import LENGTH, LikeLengths, Reading, list_set, text_set
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.fitting import Given, fitted, shape_of
from stillroom_server.distillery.training.objectives import (
    Clock,
    LateObjective,
    ListObjective,
    RerankObjective,
    TextObjective,
)
from stillroom_server.distillery.training.reading import embedded_roles
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_server.distillery.training.teacher_tokens import TeacherTokens
from stillroom_server.distillery.training.watching import watched
from stillroom_shared.errors import DataError, SettingsError

QUICK = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-2, log_steps=2, bfloat16="off")
ALIGN = LossesSettings.model_validate({"cosine": {"weight": 1}})


class Kept(nn.Module):
    """In the place of a composition: reads everything, and keeps the signals of the last batch."""

    needs = frozenset(field.name for field in fields(Signals))

    def __init__(self) -> None:
        super().__init__()
        self.last = Signals()

    def forward(self, signals: Signals, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.last = signals
        return torch.zeros(()), {}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Lessons with drawn vectors and scores."""
    made = lessons(tmp_path_factory.mktemp("bank") / "lessons")
    scores = np.random.default_rng(3).standard_normal((made.lists, CANDIDATES)).astype(np.float32)
    return Bank(made, unit(len(made)), scores)


def tokens(model: SentenceTransformer, texts: list[str]) -> dict[str, Tensor]:
    return dict(model.preprocess(texts))


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_each_text_once_an_epoch_beside_others_of_its_length(bank: Bank) -> None:
    """Guards against texts that are never learned from, and against an order that is the same every epoch."""
    rows = bank.lessons.rows("query")
    found = text_set(bank.lessons, rows)
    sampler = LikeLengths(found, 4, drop_last=False, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert all(sorted(n for batch in batches for n in batch) == list(range(len(rows))) for batches in epochs)
    assert epochs[0] != epochs[1] and epochs[0] == list(LikeLengths(found, 4, drop_last=False, seed=1))
    lengths = np.array(found[LENGTH])
    spread = np.mean([np.ptp(lengths[batch]) for batch in epochs[0]])
    assert spread < 0.3 * np.mean([np.ptp(lengths[start : start + 4]) for start in range(0, len(rows), 4)])


def test_numbers_become_the_texts_that_they_stand_for(bank: Bank) -> None:
    """Guards against candidates of another list, which would be learned as this query's."""
    found: list[list[dict[str, Any]]] = []

    def keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found.append(rows)
        return {}

    reading = Reading(keep, bank.lessons, {"lists": "list"}, passages=True)
    reading([list_set(bank.lessons, np.arange(20), whole=True)[n] for n in (3, 5)])
    for number, row in zip((3, 5), found[0], strict=True):
        assert row["query"] == bank.lessons.texts(bank.lessons.queries[[number]])[0]
        listed = bank.lessons.texts(bank.lessons.passages[number])
        assert [row[f"passage{place}"] for place in range(CANDIDATES)] == listed and row["label"] == number


def test_signals_of_texts_are_their_own_vectors_and_the_teachers(folder: Path, bank: Bank) -> None:
    """Guards against a target of another text, which trains without a complaint."""
    student, kept = tower(folder), Kept()
    rows = bank.lessons.rows("query")[:5]
    texts = bank.lessons.texts(rows)
    TextObjective(student, kept, bank, Clock())([tokens(student, texts)], torch.from_numpy(rows))  # type: ignore[arg-type]
    assert kept.last.student_queries is not None and kept.last.teacher_queries is not None
    np.testing.assert_allclose(kept.last.student_queries.detach(), student.encode(texts), atol=1e-5)
    assert bank.vectors is not None
    np.testing.assert_array_equal(kept.last.teacher_queries, bank.vectors[rows])


@pytest.mark.parametrize("corpus", [False, True])
def test_signals_of_lists_rank_the_candidates_they_name(folder: Path, bank: Bank, corpus: bool) -> None:
    """Guards against scores, grades and teacher's scores that are of different passages."""
    student, kept, numbers = tower(folder), Kept(), np.array([2, 9])
    texts = bank.lessons.texts(bank.lessons.queries[numbers])
    objective = ListObjective(student, kept, bank, Clock(), corpus=corpus)
    objective([tokens(student, texts)], torch.from_numpy(numbers))
    signals, queries = kept.last, student.encode(texts)
    assert bank.vectors is not None and bank.scores is not None and signals.grades is not None
    all_passages = bank.lessons.rows("passage")
    for place, number in enumerate(numbers):
        rows = all_passages if corpus else bank.lessons.passages[number]
        expected = [float(queries[place] @ bank.vectors[row]) for row in rows]
        np.testing.assert_allclose(signals.student_scores[place].detach(), expected, atol=1e-5)  # type: ignore[index]
        relevant = bank.lessons.passages[number][0]
        assert [row for row, grade in zip(rows, signals.grades[place], strict=True) if grade > 0] == [relevant]
        query = bank.vectors[bank.lessons.queries[number]]
        taught = [float(query @ bank.vectors[row]) for row in rows] if corpus else bank.scores[number]
        np.testing.assert_allclose(signals.teacher_scores[place], taught, atol=1e-5)  # type: ignore[index]


def test_a_text_that_was_not_embedded_is_never_learned_from(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against rows without a vector, which as zeros would be learned as a place in the teacher's space."""
    assert bank.vectors is not None
    queries, passages = bank.lessons.rows("query"), bank.lessons.rows("passage")
    partial = np.array(bank.vectors, np.float16)
    partial[passages] = np.nan
    some = Bank(bank.lessons, partial, bank.scores)
    assert some.vectors_of(queries).isfinite().all()
    for row, rows in ((passages[0], passages[:1]), (passages[3], np.array([[queries[0], passages[3]]]))):
        with pytest.raises(DataError, match=f"text {row} was not embedded, .* of passage texts too"):
            some.vectors_of(rows)
    with pytest.raises(DataError, match="was not embedded"):
        listed = LossesSettings.model_validate({"margin_mse": {"weight": 1}})
        Curriculum(losses=listed, training=QUICK, bank=some).learn(tower(folder), tmp_path)


WEIGHED = sorted(name for name, group in LossesSettings() if isinstance(group, Weighted) and name[:5] != "token")


@pytest.mark.parametrize("towers", ["query", "both"])
@pytest.mark.parametrize("name", WEIGHED)
def test_what_is_embedded_is_what_is_read(folder: Path, bank: Bank, tmp_path: Path, name: str, towers: Any) -> None:
    """Guards against a loss whose passages are left out, and against hours spent on vectors that nothing reads."""
    losses = LossesSettings.model_validate({name: {"weight": 1}})
    training = QUICK.model_copy(update={"towers": towers, "epochs": 1.0, "batch_size": 32})
    embedded = embedded_roles(losses, training, "tower")

    def learn(roles: tuple[Role, ...]) -> None:
        vectors = np.full_like(bank.vectors, np.nan)
        rows = bank.lessons.rows_of(*roles)
        vectors[rows] = unit(len(bank.lessons))[rows]
        own = Bank(bank.lessons, vectors, bank.scores)
        Curriculum(losses=losses, training=training, bank=own, teacher=tower(folder)).learn(
            tower(folder), tmp_path / "-".join(roles)
        )

    learn(embedded)
    if "passage" in embedded:
        with pytest.raises(DataError, match="was not embedded"):
            learn(("query",))


@pytest.mark.parametrize("pooling", ["mean", "attended"])
def test_token_vectors_of_the_teacher_reach_the_student(folder: Path, bank: Bank, pooling: Any) -> None:
    """Guards against a loss of tokens that a recipe takes and that never moves a weight, or follows another text's tokens."""
    losses = LossesSettings.model_validate({"token_pooling": {"weight": 1, "pooling": pooling, "temperature": 0.3}})
    student, teacher, numbers = tower(folder), late(folder), np.array([2, 9])
    with torch.no_grad():
        for parameter in bert_of(student).parameters():
            parameter.mul_(1.3)
    given = Given(dimension=DIM, candidates=CANDIDATES, tokens=shape_of(teacher))
    composition, texts = fitted(losses, QUICK, shape_of(student), given)
    assert ("teacher_passage_tokens" in composition.needs - texts) == (pooling == "attended")
    objective = ListObjective(student, composition, bank, Clock(), None, TeacherTokens(teacher))
    asked = bank.lessons.texts(bank.lessons.queries[numbers])
    loss = objective([tokens(student, asked)], torch.from_numpy(numbers))
    first = bank.lessons.texts(bank.lessons.passages[numbers, 0])
    left = [one.float().tolist() for one in teacher.encode(asked)]
    right = [one.float().tolist() for one in teacher.encode(first)]
    targets = [
        slow.pooled(e, [1] * len(e), f if pooling == "attended" else None, [1] * len(f), 0.3)
        for e, f in zip(left, right, strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(slow.cosine(student.encode(asked).tolist(), targets), abs=1e-5)
    loss.backward()
    steps = {name: one.grad for name, one in bert_of(student).named_parameters() if one.grad is not None}
    name = "encoder.layer.1.output.dense.weight"
    assert float(steps[name].abs().max()) > 1e-4 and all(one.grad is None for one in teacher.parameters())
    place, weight, sides = (3, 5), bert_of(student).get_parameter(name), list[float]()
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            weight[place] += step
        sides.append(slow.cosine(student.encode(asked).tolist(), targets))
    assert float(steps[name][place]) == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=0.05, abs=1e-4)


def test_late_students_follow_their_teachers_tokens(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against tokens that are aligned to those of another place, and against ids of another vocabulary."""
    losses = LossesSettings.model_validate({"token_alignment": {"weight": 1}})
    student, teacher = late(folder), late(folder)
    with torch.no_grad():
        for parameter in bert_of(student).parameters():
            parameter.mul_(1.3)
    kept, numbers = Kept(), np.array([4, 7])
    columns = [bank.lessons.texts(bank.lessons.queries[numbers])]
    columns += [bank.lessons.texts(rows) for rows in bank.lessons.passages[numbers].T]
    features = [dict(student.preprocess(column)) for column in columns]
    LateObjective(student, kept, bank, Clock(), TeacherTokens(teacher))(features, torch.from_numpy(numbers))  # type: ignore[arg-type]
    expected = teacher.encode(columns[0])
    assert kept.last.teacher_tokens is not None and kept.last.student_tokens is not None
    assert kept.last.teacher_tokens.shape == kept.last.student_tokens.shape
    for row, vectors in zip(kept.last.teacher_tokens, expected, strict=True):
        torch.testing.assert_close(row[: len(vectors)], vectors.float(), atol=1e-5, rtol=0)
    one = Curriculum(losses=losses, training=QUICK, bank=Bank(bank.lessons), tokens=teacher)
    before = weights(student)
    one.learn(student, tmp_path)
    assert any(not torch.equal(before[name], value) for name, value in weights(student).items())
    with pytest.raises(SettingsError, match="token_alignment needs teacher_tokens"):
        Curriculum(losses=losses, training=QUICK, bank=Bank(bank.lessons)).learn(student, tmp_path)


@pytest.mark.parametrize("loss", ["hidden_states", "attention_maps", "token_pooling"])
def test_a_teacher_does_not_read_the_ids_of_a_smaller_vocabulary(
    folder: Path, bank: Bank, tmp_path: Path, loss: str
) -> None:
    """Guards against layers that follow those of other words: ids are renumbered, and training runs without a complaint."""
    losses = LossesSettings.model_validate({loss: {"weight": 1}})
    student = trim_vocabulary(tower(folder), bank.lessons.texts(np.arange(len(bank.lessons))), size=90).student
    words = "tapir eats leaves"
    assert student.tokenizer(words)["input_ids"] != tower(folder).tokenizer(words)["input_ids"], "the guard"
    beside = {"tokens": late(folder)} if loss == "token_pooling" else {"teacher": tower(folder)}
    curriculum = Curriculum(losses=losses, training=QUICK, bank=bank, **beside)
    with pytest.raises(SettingsError, match=r"vocabularies differ: leave student\.vocabulary out"):
        curriculum.learn(student, tmp_path)


def test_both_towers_learn_from_lists_when_they_shall(folder: Path, bank: Bank) -> None:
    """Guards against passages that are constants although the student was to embed them."""
    student, kept, numbers = tower(folder), Kept(), np.array([1, 4])
    columns = [bank.lessons.texts(bank.lessons.queries[numbers])]
    columns += [bank.lessons.texts(bank.lessons.passages[numbers, place]) for place in range(CANDIDATES)]
    objective = ListObjective(student, kept, Bank(bank.lessons), Clock())
    objective([tokens(student, texts) for texts in columns], torch.from_numpy(numbers))
    signals = kept.last
    assert signals.student_passages is not None and signals.student_passages.requires_grad
    assert signals.teacher_queries is None and signals.teacher_passages is None
    for place in range(CANDIDATES):
        np.testing.assert_allclose(
            signals.student_passages[:, place].detach(), student.encode(columns[place + 1]), atol=1e-5
        )


def test_a_reranker_scores_each_candidate_with_its_own_query(folder: Path, bank: Bank) -> None:
    """Guards against a pair whose query is another's: rows and columns exchanged."""
    student, kept, numbers = reranker(folder), Kept(), np.array([0, 3, 8])
    queries = bank.lessons.texts(bank.lessons.queries[numbers])
    columns = [bank.lessons.texts(bank.lessons.passages[numbers, place]) for place in range(CANDIDATES)]
    RerankObjective(student, kept, bank, Clock())([queries, *columns], torch.from_numpy(numbers))  # type: ignore[arg-type]
    for row, query in enumerate(queries):
        pairs = [(query, column[row]) for column in columns]
        expected = student.predict(pairs, activation_fn=nn.Identity(), show_progress_bar=False)
        np.testing.assert_allclose(kept.last.student_scores[row].detach(), expected, atol=1e-5)  # type: ignore[index]


def test_late_interaction_scores_are_those_of_the_library(folder: Path, bank: Bank) -> None:
    """Guards against padding that wins a MaxSim, and against candidates of another query."""
    student, kept, numbers = late(folder), Kept(), np.array([0, 3])
    queries = bank.lessons.texts(bank.lessons.queries[numbers])
    columns = [bank.lessons.texts(bank.lessons.passages[numbers, place]) for place in range(CANDIDATES)]
    features = [{**student.preprocess(queries, task="query"), "task": "query"}]
    features += [{**student.preprocess(texts, task="document"), "task": "document"} for texts in columns]
    LateObjective(student, kept, bank, Clock())(features, torch.from_numpy(numbers))  # type: ignore[arg-type]
    for row, query in enumerate(queries):
        asked = student.encode_query([query])
        held = student.encode_document([column[row] for column in columns])
        expected = student.similarity(asked, held)[0]
        np.testing.assert_allclose(kept.last.student_scores[row].detach(), expected, atol=1e-4)  # type: ignore[index]


def test_what_is_watched_is_what_transformers_returns(folder: Path) -> None:
    """Guards against states of the wrong layer, and against attention that nobody sees because it is fused."""
    student = tower(folder)
    student.train(False)
    read = tokens(student, ["open a zip file", "sort"])
    with torch.no_grad(), watched(student, on=True) as seen:
        student(dict(read))
    bert = bert_of(student)
    assert not any(part._forward_hooks for part in bert.modules())
    with torch.no_grad():
        expected = bert(**read, output_hidden_states=True, output_attentions=True)
    assert seen is not None
    for ours, theirs in zip(seen.states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(seen.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_alignment_brings_the_student_to_the_teacher(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against a trainer that runs to its end and changes nothing."""
    student = tower(folder)
    assert bank.vectors is not None
    rows = bank.lessons.rows("query")
    texts, targets = bank.lessons.texts(rows), bank.vectors[rows]
    before = float((student.encode(texts) * targets).sum(1).mean())
    training = QUICK.model_copy(update={"epochs": 20.0})
    Curriculum(losses=ALIGN, training=training, bank=bank).learn(student, tmp_path)
    assert float((student.encode(texts) * targets).sum(1).mean()) > before + 0.3
    curves = list((tmp_path / "curves").glob("events.*"))
    assert len(curves) == 1 and b"loss/cosine" in curves[0].read_bytes()


@pytest.mark.parametrize("stop", [3, 9])
def test_interrupted_and_resumed_it_ends_with_the_same_weights(
    folder: Path, bank: Bank, tmp_path: Path, stop: int
) -> None:
    """Guards against a resumed run that sees texts twice, forgets its optimizer, or the projections of its losses."""
    losses = LossesSettings.model_validate(
        {"cosine": {"weight": 1, "warmup": 0.5}, "contrastive": {"weight": 0.1}, "matryoshka": {"dims": [8]}}
    )
    other = Bank(bank.lessons, unit(len(bank.lessons), 20), bank.scores)  # of another length: a projection is learned
    training = QUICK.model_copy(update={"ranked": "listed", "towers": "both"})
    curriculum = Curriculum(losses=losses, training=training, bank=other)

    def interrupt(done: int, total: int) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    whole, first, second = tower(folder), tower(folder), tower(folder)
    curriculum.learn(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        curriculum.learn(first, tmp_path / "parts", progress=interrupt)
    steps: list[int] = []
    curriculum.learn(second, tmp_path / "parts", progress=lambda done, total: steps.append(done))
    assert steps[0] == stop + 1
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    assert any(not torch.equal(value, weights(first)[name]) for name, value in weights(second).items())


def test_interrupted_in_its_last_step_it_takes_no_other(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against a step beyond the last, which is looked for at the ends of steps and of whole epochs only."""
    curriculum = Curriculum(losses=ALIGN, training=QUICK.model_copy(update={"epochs": 1.5}), bank=bank)

    def interrupt(done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGINT)

    whole, second, steps = tower(folder), tower(folder), list[int]()
    curriculum.learn(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        curriculum.learn(tower(folder), tmp_path / "parts", progress=interrupt)
    curriculum.learn(second, tmp_path / "parts", progress=lambda done, total: steps.append(done))
    assert steps == [] and not second.training
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_loss_without_its_signal_is_refused_before_training(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against a run of hours that ends where the first list is read."""
    curriculum = Curriculum(
        losses=LossesSettings.model_validate({"margin_mse": {"weight": 1}}),
        training=QUICK,
        bank=Bank(bank.lessons, bank.vectors),
    )
    with pytest.raises(SettingsError, match="margin_mse"):
        curriculum.learn(tower(folder), tmp_path)
    with pytest.raises(SettingsError, match="cosine needs teacher_queries"):
        Curriculum(losses=ALIGN, training=QUICK, bank=Bank(bank.lessons)).learn(tower(folder), tmp_path)
    with pytest.raises(DataError, match="vectors for"):
        Bank(bank.lessons, unit(3))
    listed, other = LossesSettings.model_validate({"contrastive": {"weight": 1}}), unit(len(bank.lessons), 20)
    with pytest.raises(SettingsError, match=r"have 32 values, and passages keep .* 20: set student.dimension to 20"):
        Curriculum(losses=listed, training=QUICK, bank=Bank(bank.lessons, other)).learn(tower(folder), tmp_path)


def test_rerankers_and_late_interaction_learn_their_teachers_order(folder: Path, bank: Bank, tmp_path: Path) -> None:
    """Guards against a kind of student whose trainer was never run."""
    losses = LossesSettings.model_validate({"listwise_kl": {"weight": 1}})
    training = QUICK.model_copy(update={"epochs": 12.0, "learning_rate": 5e-3})
    students: list[CrossEncoder | MultiVectorEncoder] = [reranker(folder), late(folder)]
    for student in students:
        values: list[float] = []
        curriculum = Curriculum(losses=losses, training=training, bank=bank)
        place = tmp_path / type(student).__name__
        curriculum.learn(student, place)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(place / "curves"))
        events.Reload()
        values = [point.value for point in events.Scalars("train/loss/listwise_kl")]
        assert np.mean(values[-3:]) < 0.7 * np.mean(values[:3]), type(student)


_SHARE = """
import os
import sys
from pathlib import Path
from tests.server.distillery.learners import lessons, tower, unit
from tests.server.distillery.test_training import mixed, several
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.training.bank import Bank
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.settings import TrainingSettings
from stillroom_shared.errors import DataError
from accelerate import PartialState

model, data, out = map(Path, sys.argv[1:])
found = Lessons.open(data)
losses = LossesSettings.model_validate({"cosine": {"weight": 1}})
training = TrainingSettings(
    epochs=2, batch_size=5, learning_rate=1e-2, bfloat16="off", schedule="constant",
    save_minutes=0.003 * (1 + int(os.environ.get("RANK", "0"))),  # alone, they would save at other steps
)
student = tower(model)
bank = Bank(found, unit(len(found), 20))
Curriculum(losses=losses, training=training, bank=bank).learn(student, out / "training")
for name, curriculum in several(model, training, found).items():
    one = tower(model)
    curriculum.learn(one, out / f"{name}-training")
    if PartialState().is_main_process:
        one.save_pretrained(str(out / name), create_model_card=False)
uneven = training.model_copy(update={"batch_size": 4})  # 17 batches and 2 texts, 5 of lists
mixed(model, uneven, found).learn(tower(model), out / "uneven-training")
try:
    mixed(model, training.model_copy(update={"batch_size": 64}), found).learn(tower(model), out / "none")
except DataError as error:
    assert "batch_size 64: 70 and 20 texts or lists are no full batch for each of 2" in str(error)
else:
    raise AssertionError("processes without a batch")
if PartialState().is_main_process:
    student.save_pretrained(str(out), create_model_card=False)
"""


def mixed(folder: Path, training: TrainingSettings, found: Lessons) -> Curriculum:
    """Learns hidden states from texts, and from lists passages too, through a projection that texts do not use."""
    losses = LossesSettings.model_validate({"hidden_states": {"weight": 1}, "l2": {"weight": 1, "side": "passages"}})
    settings = training.model_copy(update={"towers": "both"})
    return beside(folder, losses, settings, Bank(found, unit(len(found), 20)))


def several(folder: Path, training: TrainingSettings, found: Lessons) -> dict[str, Curriculum]:
    """Curricula of which one process may learn from lists while another learns from texts, which use fewer parameters."""
    return {
        "mixed": mixed(folder, training, found),
        "attending": attending(folder, training, found),
        "of-texts": attending(folder, training, found, listed=0),
    }


def attending(folder: Path, training: TrainingSettings, found: Lessons, *, listed: float = 1) -> Curriculum:
    """Learns attention maps, for which the last layer's output is nothing, and ranking from lists, for which it is."""
    losses = LossesSettings.model_validate({"attention_maps": {"weight": 1}, "contrastive": {"weight": listed}})
    return beside(folder, losses, training, Bank(found, unit(len(found))))


def beside(folder: Path, losses: LossesSettings, training: TrainingSettings, bank: Bank) -> Curriculum:
    teacher = tower(folder)
    with torch.no_grad():
        for weight in bert_of(teacher).encoder.parameters():
            weight.mul_(1.1)
    return Curriculum(losses=losses, training=training, bank=bank, teacher=teacher)


def test_processes_train_together_like_one_that_takes_all_shares(folder: Path, tmp_path: Path) -> None:
    """Guards against processes that train alone, or wait for each other in a checkpoint, in a projection or a layer that one
    of them did not use or for a batch that one of them has more; and against projections that drift."""
    found = lessons(tmp_path / "lessons", queries=40)
    alone = tower(folder)
    training = TrainingSettings(
        epochs=2, batch_size=5, learning_rate=1e-2, bfloat16="off", schedule="constant", accumulate=2
    )
    bank = Bank(found, unit(len(found), 20))  # of another length: a projection is learned beside the student
    Curriculum(losses=ALIGN, training=training, bank=bank).learn(alone, tmp_path / "alone")
    out = tmp_path / "together"
    in_two_processes(_SHARE, tmp_path, folder, tmp_path / "lessons", out)
    texts = ["open a zip file", "river bank"]
    models = {".": alone}
    for name, curriculum in several(folder, training, found).items():
        curriculum.learn(models.setdefault(name, tower(folder)), tmp_path / name)
    for name, model in models.items():
        together = SentenceTransformer(str(out / name), device="cpu")
        np.testing.assert_allclose(together.encode(texts), model.encode(texts), atol=1e-4, err_msg=name)
        assert np.abs(together.encode(texts) - tower(folder).encode(texts)).max() > 0.01


@pytest.mark.parametrize("torn", ["model.safetensors", "losses.pt"])
def test_what_a_kill_left_of_a_checkpoint_is_not_resumed_from(
    folder: Path, bank: Bank, tmp_path: Path, torn: str
) -> None:
    """Guards against a run that was killed while it saved, and can never be resumed."""
    curriculum = Curriculum(losses=ALIGN, training=QUICK, bank=bank)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole, second = tower(folder), tower(folder)
    curriculum.learn(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        curriculum.learn(tower(folder), tmp_path / "parts", progress=interrupt)
    saved = tmp_path / "parts" / "checkpoints" / "checkpoint-3"
    killed = shutil.copytree(saved, saved.with_name("checkpoint-5"))
    (killed / "losses.pt").unlink()  # written last
    (killed / torn).unlink(missing_ok=True)
    steps: list[int] = []
    curriculum.learn(second, tmp_path / "parts", progress=lambda done, total: steps.append(done))
    assert steps[0] == 4 and not killed.exists()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_attention_maps_follow_a_teacher_that_was_loaded_with_fused_attention(
    folder: Path, bank: Bank, tmp_path: Path
) -> None:
    """Guards against a loss that no recipe can use: models are loaded with attention that gives no maps."""
    teacher = tower(folder)
    bert_of(teacher).set_attn_implementation("sdpa")
    losses = LossesSettings.model_validate({"attention_maps": {"weight": 1}, "cosine": {"weight": 1}})
    student, before = tower(folder), weights(tower(folder))
    Curriculum(losses=losses, training=QUICK, bank=bank, teacher=teacher).learn(student, tmp_path)
    assert any(not torch.equal(value, before[name]) for name, value in weights(student).items())


def test_over_the_corpus_a_passage_is_relevant_if_any_list_of_the_query_says_so(folder: Path, tmp_path: Path) -> None:
    """Guards against passages that are known to be relevant and are learned as negatives."""
    with LessonsWriter(tmp_path / "lessons", candidates=2) as writer:
        source = writer.source("words")
        passages = [writer.text(f"tapir {n}", "passage", source) for n in range(5)]
        queries = [writer.text(f"zip {n}", "query", source) for n in range(2)]
        for query, relevant, grade in ((0, 1, 1), (1, 4, 1), (0, 3, 2)):
            writer.list(queries[query], [passages[relevant], passages[0]], [grade, 0], source)
    made = Lessons.open(tmp_path / "lessons")
    student, kept = tower(folder), Kept()
    objective = ListObjective(student, kept, Bank(made, unit(len(made))), Clock(), corpus=True)
    numbers = np.array([2, 0, 1])
    read = tokens(student, made.texts(made.queries[numbers]))
    objective([read], torch.from_numpy(numbers))
    assert kept.last.grades is not None
    assert kept.last.grades.tolist() == [[0, 1, 0, 2, 0], [0, 1, 0, 2, 0], [0, 0, 0, 0, 1]]
