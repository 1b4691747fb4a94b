"""Teachers: each scores what it says, whatever else is in the call, and nothing opens as what it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tantivy
import torch
from sentence_transformers import SentenceTransformer
from tests.references.bm25 import bm25
from tests.references.maxsim import maxsim
from tests.server.distillery.tiny_models import save_models
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.faculty import Faculty
from stillroom_server.distillery.recipe import Recipe
from stillroom_server.distillery.teachers.base import Embedder, FloatArray, Teacher
from stillroom_server.distillery.teachers.bi_encoder import BiEncoder
from stillroom_server.distillery.teachers.bm25 import Bm25, analyzer
from stillroom_server.distillery.teachers.cross_encoder import CrossEncoder
from stillroom_server.distillery.teachers.late_interaction import LateInteraction
from stillroom_server.distillery.teachers.opening import open_teacher, open_teachers
from stillroom_server.distillery.teachers.settings import Kind, TeacherSettings
from stillroom_server.distillery.teachers.teacher_set import Member, TeacherSet
from stillroom_shared.errors import DataError, SettingsError

QUERIES = ["what do tapirs eat", "open the zip file", "open the zip file", "sort"]
TEXTS = [
    "The tapir eats leaves.",
    "A zip file holds members: open it, list the members, read one, close the file when you are done with it.",
    "Sort the list of numbers in the array.",
    "The river.",
    "",
]
LISTS = [TEXTS, TEXTS[:2], [], [TEXTS[3], TEXTS[3], TEXTS[1]]]
KINDS: tuple[Kind, ...] = ("bi-encoder", "cross-encoder", "late-interaction", "bm25")


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, str]:
    """A folder of each kind, of width 32."""
    folders = save_models(tmp_path_factory.mktemp("teachers"), tiny_towers[1], tiny_tokenizer)
    return {**folders, "late-interaction": folders["bi-encoder"], "bm25": "offline"}


@pytest.fixture
def opened(models: dict[str, str]) -> Callable[..., Teacher]:
    def open_kind(kind: Kind, **changes: object) -> Teacher:
        settings = TeacherSettings.model_validate({"kind": kind, "model": models[kind], "device": "cpu", **changes})
        return open_teacher(settings, passages=TEXTS)

    return open_kind


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_of_the_pair_alone(kind: Kind, opened: Callable[..., Teacher]) -> None:
    """Scores that leak between neighbours in a batch (padding, duplicates, order) are kept under the wrong pair for ever."""
    teacher = opened(kind, batch_size=3)
    assert isinstance(teacher, Teacher) and isinstance(teacher, Embedder) == (kind == "bi-encoder")
    scores = teacher.score(QUERIES, LISTS)
    assert [len(own) for own in scores] == [5, 2, 0, 3] and all(own.dtype == np.float32 for own in scores)
    tolerance = 0 if kind == "bm25" else 2e-5
    fresh = opened(kind, batch_size=1)
    for query, own, found in zip(QUERIES, LISTS, scores, strict=True):
        for text, score in zip(own, found, strict=True):
            [[alone]] = fresh.score([query], [[text]])
            assert abs(alone - score) <= tolerance, (query, text)
    assert len({round(float(score), 3) for score in scores[0]}) >= 2  # not vacuous
    assert teacher.score([], []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_of_all_that_scores_depend_on(kind: Kind, opened: Callable[..., Teacher], tmp_path: Path) -> None:
    """One hash for two teachers gives one of them the other's scores; a hash that moves computes everything again."""
    teacher = opened(kind)
    before = teacher.identity
    teacher.score(QUERIES, LISTS)
    assert opened(kind, batch_size=7, weight=3.0, temperature=2.0, token_cache_mib=0).identity == before
    changes: list[dict[str, object]] = [{"bm25_k1": 0.9}, {"bm25_b": 0.4}, {"bm25_language": "none"}]
    if kind != "bm25":
        changes = [{"query_tokens": 5}, {"passage_tokens": 5}, {"precision": "bfloat16"}, {"query_prompt": "q: "}]
        moved = tmp_path / "moved"
        teacher.model.save_pretrained(str(moved), create_model_card=False)  # type: ignore[attr-defined]
        assert opened(kind, model=str(moved)).identity == before
    assert len({before, *(opened(kind, **change).identity for change in changes)}) == len(changes) + 1


def test_identity_sees_weights_and_tokenizer(models: dict[str, str]) -> None:
    """A fine-tuned model in the same folder would be answered with the scores of the old one."""
    settings = TeacherSettings(model=models["bi-encoder"], device="cpu")
    first, second, third = (BiEncoder(SentenceTransformer(settings.model, device="cpu"), settings) for _ in range(3))
    with torch.no_grad():
        second.model.get_parameter("0.model.encoder.layer.1.output.dense.weight")[0, 0] += 1e-3
    third.model.tokenizer.add_tokens(["tapir-eater"])
    assert len({one.identity for one in (first, second, third)}) == 3
    found = {first.identity}
    for name in ("a", "b"):  # put before texts whose role has no prompt of its own
        first.model.prompts, first.model.default_prompt_name = {"a": "ask: ", "b": "tell: "}, name
        found.add(BiEncoder(first.model, settings).identity)
    first.model.tokenizer.chat_template = "{{ messages }}"
    found.add(BiEncoder(first.model, settings).identity)
    first.model.truncate_dim = 8
    assert len({*found, BiEncoder(first.model, settings).identity}) == 5


def test_who_mines_negatives(models: dict[str, str], tmp_path: Path) -> None:
    """Without a teacher's scores no margin is kept to what is relevant, because BM25 was named first."""
    words, cross = {"kind": "bm25"}, {"kind": "cross-encoder", "model": models["cross-encoder"]}
    bi = {"model": models["bi-encoder"]}
    reranker = {"begins": "cross", "student": {"kind": "reranker"}, "losses": {"margin_mse": {"weight": 1}}}
    for others, expected in (({}, "cross"), ({"bi": bi}, "bi")):
        recipe = Recipe.model_validate({"teachers": {"words": words, "cross": cross, **others}, **reranker})
        faculty = Faculty(recipe, tmp_path)
        assert faculty.miner is faculty.teacher(expected)


def test_limits_and_prompts_reach_the_model(opened: Callable[..., Teacher], models: dict[str, str]) -> None:
    """A limit that is only hashed, or a prompt put before the wrong role, changes nothing that anybody sees."""
    long, short = "open the file " * 9, "open the"
    limited = opened("bi-encoder", query_tokens=4, passage_tokens=4)
    assert isinstance(limited, BiEncoder)
    np.testing.assert_allclose(limited.embed([long], "query"), limited.embed([short], "passage"), atol=1e-6)
    prompted = opened("bi-encoder", query_prompt="zip ", passage_prompt="river ")
    assert isinstance(prompted, BiEncoder)
    plain = BiEncoder(prompted.model, TeacherSettings())
    np.testing.assert_allclose(prompted.embed(["file"], "query"), plain.embed(["zip file"], "query"), atol=1e-6)
    np.testing.assert_allclose(prompted.embed(["file"], "passage"), plain.embed(["river file"], "passage"), atol=1e-6)
    own = SentenceTransformer(models["bi-encoder"], device="cpu", prompts={"query": "zip ", "document": "river "})
    np.testing.assert_allclose(
        BiEncoder(own, TeacherSettings()).embed(["file"], "passage"), plain.embed(["river file"], "query"), atol=1e-6
    )
    cut = opened("cross-encoder", query_tokens=4, passage_tokens=6)
    assert cut.score(["sort"], [[long]])[0] == pytest.approx(cut.score(["sort"], [[long * 2]])[0], abs=1e-6)
    assert abs(opened("cross-encoder").score(["sort"], [[long]])[0] - cut.score(["sort"], [[long]])[0]) > 1e-4


def test_a_cross_encoder_gives_logits(opened: Callable[..., Teacher]) -> None:
    """A sigmoid, which the library applies by default, makes all sure scores equal."""
    teacher = opened("cross-encoder")
    assert isinstance(teacher, CrossEncoder)
    assert teacher.model.tokenizer is not None and teacher.model.model is not None
    features = teacher.model.tokenizer("sort", "The river.", return_tensors="pt")
    with torch.inference_mode():
        logit = float(teacher.model.model(**features).logits)
    assert teacher.score(["sort"], [["The river."]])[0] == pytest.approx(logit, abs=1e-5)
    with torch.no_grad():
        teacher.model.model.get_parameter("classifier.bias")[0] += 100.0
    assert teacher.score(["sort"], [["The river."]])[0] == pytest.approx(logit + 100, abs=1e-4)


@pytest.mark.parametrize("model", ["late-interaction", "colbert"])
def test_late_interaction_is_maxsim(model: str, models: dict[str, str]) -> None:
    """Padding tokens that take part in a maximum, or a projection nobody trained, rank all the same."""
    teacher = open_teacher(TeacherSettings(kind="late-interaction", model=models[model], device="cpu", batch_size=2))
    assert isinstance(teacher, LateInteraction)
    left, right = teacher.tokens(QUERIES[:2], "query"), teacher.tokens(TEXTS, "passage")
    assert all(torch.linalg.norm(one, dim=1).allclose(torch.ones(len(one)), atol=1e-5) for one in [*left, *right])
    assert right[0].shape[1] == (128 if model == "colbert" else 32)
    for vectors, found in zip(left, teacher.score(QUERIES[:2], [TEXTS, TEXTS]), strict=True):
        expected = [maxsim(vectors.tolist(), one.tolist()) for one in right]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_token_vectors_that_are_kept_are_bounded(opened: Callable[..., Teacher]) -> None:
    """A cache without a limit fills the memory with a corpus; one that drops what it needs now loses scores."""
    texts = [f"{'zip ' * 40}{number}" for number in range(600)]  # 32 x 4 bytes a token, more than 1 MiB together
    small, none = opened("late-interaction", token_cache_mib=1), opened("late-interaction", token_cache_mib=0)
    assert isinstance(small, LateInteraction) and isinstance(none, LateInteraction)
    first, again = (small.score(["zip"], [texts])[0] for _ in range(2))
    assert 0 < sum(one.nbytes for one in small._kept.values()) == small._kept_bytes <= 1 << 20
    np.testing.assert_allclose(first, again, atol=1e-5)
    np.testing.assert_allclose(first, none.score(["zip"], [texts])[0], atol=1e-5)
    assert not none._kept and none._kept_bytes == 0


def test_bm25_is_the_formula_and_ranks_as_tantivy_does() -> None:
    """A length or a document count that is off by one still ranks plausibly."""
    generator = np.random.default_rng(0)
    words = ["open", "files", "zip", "listing", "members", "sorted", "tapirs", "eating", "leaves", "river", "banks"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 38))) for _ in range(60)]
    queries = [" ".join(generator.choice(words, 3, replace=False)) for _ in range(8)]
    queries += ["zip zip", "unheard"]
    stems = analyzer("english").analyze
    for k1, b in ((1.2, 0.75), (0.9, 0.4)):
        teacher = Bm25(texts, TeacherSettings(kind="bm25", bm25_k1=k1, bm25_b=b))
        for query, found in zip(queries, teacher.score(queries, [texts] * len(queries)), strict=True):
            corpus = [stems(text) for text in texts]
            expected = [bm25(stems(query), passage, corpus, k1, b) for passage in corpus]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    schema = tantivy.SchemaBuilder().add_text_field("text", tokenizer_name="own").add_unsigned_field("row", stored=True)
    index = tantivy.Index(schema.build())
    index.register_tokenizer("own", analyzer("english"))
    writer = index.writer(num_threads=1)
    for row, text in enumerate(texts):
        writer.add_document(tantivy.Document(text=text, row=row))
    writer.commit()
    index.reload()
    searcher = index.searcher()
    ours = Bm25(texts, TeacherSettings(kind="bm25")).score(queries, [texts] * len(queries))
    for query, found in zip(queries[:8], ours[:8], strict=True):
        hits = searcher.search(index.parse_query(query, ["text"]), limit=60).hits
        theirs = {searcher.doc(place)["row"][0]: score for score, place in hits}
        assert theirs and set(theirs) == set(np.flatnonzero(found).tolist())
        np.testing.assert_allclose([found[row] for row in theirs], list(theirs.values()), rtol=1e-4)


def test_bm25_refuses_what_has_no_words() -> None:
    """A mean length of 0 divides by zero, or makes every score 0."""
    for passages in ([], ["", "..."]):
        with pytest.raises(SettingsError, match="found no words"):
            Bm25(passages, TeacherSettings(kind="bm25"))
    with pytest.raises(SettingsError, match="without passages"):
        open_teacher(TeacherSettings(kind="bm25"))
    with pytest.raises(SettingsError, match="bm25_language is 'klingon'"):
        Bm25(TEXTS, TeacherSettings(kind="bm25", bm25_language="klingon"))


def test_what_is_no_teacher_of_the_kind_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    """The library opens each of these, with a random head or untrained vectors, and teaches noise."""
    cases: list[tuple[Kind, str, str]] = [
        ("cross-encoder", models["three"], "has 3 outputs"),
        ("cross-encoder", models["bi-encoder"], "without a scoring head: train one with `stillroom distill teach`"),
        ("cross-encoder", models["colbert"], "MultiVectorEncoder without a scoring head"),
        ("bi-encoder", models["cross-encoder"], "it is a CrossEncoder"),
        ("bi-encoder", models["colbert"], "it is a MultiVectorEncoder"),
        ("late-interaction", models["cross-encoder"], "it is a CrossEncoder"),
        *((kind, str(tmp_path / "absent"), "cannot be loaded") for kind in KINDS[:3]),
    ]
    for kind, model, message in cases:
        with pytest.raises(SettingsError, match=message):
            open_teacher(TeacherSettings(kind=kind, model=model, device="cpu"))


class Fixed:
    """A teacher that says what it is told."""

    def __init__(self, *scores: list[float]) -> None:
        self.identity = repr(scores)
        self._scores = scores

    def score(self, queries: object, passages: object) -> list[FloatArray]:
        return [np.array(own, np.float32) for own in self._scores]


def test_a_set_is_the_weighted_mean_of_normalised_scores() -> None:
    """BM25 at 30 beside cosines at 0.3 decides alone; a constant list divides by zero."""
    loud, quiet = Fixed([30.0, 10.0, 20.0], [7.0, 7.0]), Fixed([0.1, 0.3, 0.2], [0.25, 0.75])
    both = TeacherSet([Member(loud, weight=1.0), Member(quiet, weight=3.0, temperature=2.0)])
    first, second = both.score(["a", "b"], [["x", "y", "z"], ["x", "y"]])
    one = 3 / 6**0.5 * 2 / 2 * 1  # deviation of 1, 2, 3 is sqrt(2/3): 1 / sqrt(2/3) = 3 / sqrt(6)
    np.testing.assert_allclose(first, [(one - 1.5 * one) / 4, (-one + 1.5 * one) / 4, 0], atol=1e-6)
    np.testing.assert_allclose(second, [(0 - 1.5) / 4, (0 + 1.5) / 4], atol=1e-6)
    ranged = TeacherSet(both.members, "range").score(["a", "b"], [["x", "y", "z"], ["x", "y"]])[0]
    np.testing.assert_allclose(ranged, [1 / 4, 1.5 / 4, (0.5 + 0.75) / 4], atol=1e-6)
    assert [len(member) for member in both.member_scores(["a", "b"], [[], []])] == [2, 2]
    variants = (both, TeacherSet(both.members, "range"), TeacherSet(both.members[:1]), TeacherSet(both.members[::-1]))
    assert len({one.identity for one in variants}) == 4


def test_sets_refuse_what_has_no_mean(models: dict[str, str]) -> None:
    """A negative weight turns a teacher round; one NaN makes every score NaN."""
    for members in ([], [Member(Fixed([1.0]), weight=0)], [Member(Fixed([1.0]), temperature=-1)]):
        with pytest.raises(SettingsError, match="give one or more, all above 0"):
            TeacherSet(members)
    with pytest.raises(DataError, match="teacher 1 of a set"):
        TeacherSet([Member(Fixed([1.0])), Member(Fixed([float("nan")]))]).score(["a"], [["x"]])
    several = [TeacherSettings(kind=kind, model=models[kind], device="cpu") for kind in ("bm25", "bi-encoder")]
    assert isinstance(open_teachers(several, passages=lambda: TEXTS), TeacherSet)
    assert isinstance(open_teachers(several[1:]), BiEncoder)
    alone = open_teachers(several[1:], always=True)
    [scores] = alone.score(["what do tapirs eat"], [TEXTS])
    assert scores.mean() == pytest.approx(0, abs=1e-5) and scores.std() == pytest.approx(1, abs=1e-4)
