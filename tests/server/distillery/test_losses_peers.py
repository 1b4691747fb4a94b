"""Where Sentence Transformers has the loss, ours is the same: value and gradient of every weight, on one batch of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.cross_encoder import losses as of_pairs
from sentence_transformers.multi_vector_encoder import losses as of_tokens
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer import losses as of_vectors
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn

from stillroom_server.distillery.losses.alignment import cosine, l2
from stillroom_server.distillery.losses.composition import compose
from stillroom_server.distillery.losses.listwise import contrastive, listwise_kl
from stillroom_server.distillery.losses.margins import margin_hinge, margin_mse
from stillroom_server.distillery.losses.matryoshka import inner_products
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.losses.tokens import maxsim

QUERIES = ["what do tapirs eat", "open a zip file", "sort the list", "river bank"]
COLUMNS = [
    ["The tapir eats leaves.", "open(path) gives a file.", "sort returns an index.", "the bank of a river"],
    ["A zip file holds members.", "read and write", "list of members, search the index.", "matrix of numbers"],
    ["close it.", "a tapir", "how do i search passages", "true or false when given"],
]
SCORES = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.1, 3.0], [1.5, 1.0, -2.0], [4.0, 0.0, 0.2]])
DIM = 32
TARGETS = nn.functional.normalize(torch.randn(4, 4, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture(scope="module")
def tower(folder: Path) -> SentenceTransformer:
    """Unit vectors."""
    modules = [read(folder), Pooling(DIM, "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu").eval()


@pytest.fixture(scope="module")
def late(folder: Path) -> MultiVectorEncoder:
    """Unit vectors for each token."""
    modules: list[nn.Module] = [read(folder), MultiVectorMask(), Normalize("token_embeddings", "token_embeddings")]
    return MultiVectorEncoder(modules=modules, device="cpu").eval()


@pytest.fixture(scope="module")
def pairs(folder: Path) -> CrossEncoder:
    """A logit for each pair."""
    torch.manual_seed(2)
    scorer: CrossEncoder = CrossEncoder(str(folder), num_labels=1, device="cpu", local_files_only=True).eval()
    return scorer


def read(folder: Path) -> Transformer:
    found: Transformer = Transformer(
        str(folder), processor_kwargs={"model_max_length": 48}, model_kwargs={"local_files_only": True}
    )
    return found


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


def assert_equal(model: nn.Module, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> None:
    """Values and gradients, none of them trivial."""
    value, other = theirs(), ours()
    torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6)
    expected, found = (torch.cat([x.flatten() for x in gradients(model, loss)]) for loss in (value, other))
    assert value.item() > 1e-3 and expected.norm() > 1e-3, "the guard: there is a gradient"
    assert (found - expected).norm() < 1e-5 * expected.norm()


def features(model: SentenceTransformer | MultiVectorEncoder, columns: Sequence[list[str]]) -> list[dict[str, Any]]:
    return [model.preprocess(texts) for texts in columns]


def signals_of(tower: SentenceTransformer, *, columns: int = 3, grades: Tensor | None = None) -> Signals:
    batch = features(tower, [QUERIES, *COLUMNS[:columns]])
    queries, *passages = [tower(dict(one))["sentence_embedding"] for one in batch]
    stacked = torch.stack(passages, dim=1)  # (batch, k, dim)
    return Signals(
        student_queries=queries,
        student_passages=stacked,
        student_scores=inner_products(queries, stacked),
        teacher_queries=TARGETS[:, 0],
        teacher_passages=TARGETS[:, 1 : columns + 1],
        teacher_scores=SCORES[:, :columns],
        grades=grades,
    )


def test_alignment_is_theirs_times_the_dimension(tower: SentenceTransformer) -> None:
    """Guards against a factor between recipes here and there that nobody wrote down: learning rates depend on it."""
    batch, everything = features(tower, [QUERIES]), features(tower, [QUERIES, *COLUMNS])
    mean_of_values = of_vectors.MSELoss(tower)
    cosines = of_vectors.EmbedDistillLoss(tower, distance_metric="cosine")
    labels = TARGETS[:, 0]
    assert_equal(tower, lambda: DIM * mean_of_values(batch, labels), lambda: l2(signals_of(tower)))
    assert_equal(tower, lambda: cosines(batch, labels), lambda: cosine(signals_of(tower)))
    assert_equal(tower, lambda: cosines(everything, TARGETS), lambda: cosine(signals_of(tower), side="both"))
    assert_equal(tower, lambda: DIM * mean_of_values(everything, TARGETS), lambda: l2(signals_of(tower), side="both"))


def test_alignment_through_a_projection_is_theirs(tower: SentenceTransformer) -> None:
    """Guards against a projection that is never trained, or made anew in each step."""
    losses = LossesSettings.model_validate({"cosine": {"weight": 1}})
    ours = compose(losses, student_dim=DIM, teacher_dim=48, seed=5)
    theirs = of_vectors.EmbedDistillLoss(tower, distance_metric="cosine", projection_dim=48)
    assert theirs.projection is not None
    theirs.projection.load_state_dict(ours.projections["vectors"].state_dict())
    labels = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    signals = Signals(student_queries=signals_of(tower).student_queries, teacher_queries=labels)
    total, _ = ours(signals, 1.0)
    expected = theirs(features(tower, [QUERIES]), labels)
    torch.testing.assert_close(total, expected)
    for one, two in zip(gradients(theirs.projection, expected), gradients(ours, total), strict=True):
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("columns", [2, 3])
def test_margin_mse_is_theirs(tower: SentenceTransformer, columns: int) -> None:
    """Guards against a mean over queries where theirs is over pairs."""
    batch = features(tower, [QUERIES, *COLUMNS[:columns]])
    theirs = of_vectors.MarginMSELoss(tower)
    labels = SCORES[:, :columns]
    assert_equal(tower, lambda: theirs(batch, labels), lambda: margin_mse(signals_of(tower, columns=columns)))


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (3.0, 1.0), (2.0, 8.0)])
def test_listwise_kl_is_theirs_times_the_scale_squared(
    tower: SentenceTransformer, temperature: float, scale: float
) -> None:
    """Guards against T squared that is missing on one side, and divergences in the other direction."""
    batch = features(tower, [QUERIES, *COLUMNS])
    theirs = of_vectors.DistillKLDivLoss(
        tower, student_temperature=temperature / scale, teacher_temperature=temperature
    )
    assert_equal(
        tower,
        lambda: scale**2 * theirs(batch, SCORES),
        lambda: listwise_kl(signals_of(tower), temperature=temperature, student_scale=scale),
    )


def test_in_batch_contrastive_is_theirs(tower: SentenceTransformer) -> None:
    """Guards against labels that point at another query's passage."""
    batch = features(tower, [QUERIES, *COLUMNS])
    plain = of_vectors.MultipleNegativesRankingLoss(tower, scale=20.0)
    cached = of_vectors.CachedMultipleNegativesRankingLoss(tower, scale=20.0, mini_batch_size=2)
    ours = contrastive(signals_of(tower), temperature=0.05, in_batch=True)
    graded = torch.tensor([[1, 0, 0]] * 4)
    assert_equal(
        tower,
        lambda: plain(batch, None),
        lambda: contrastive(signals_of(tower, grades=graded), temperature=0.05, in_batch=True),
    )
    torch.testing.assert_close(cached(batch, None).detach(), ours.detach())


def test_contrastive_is_theirs_one_query_at_a_time(tower: SentenceTransformer) -> None:
    """Guards against records that are coupled where nobody asked for it."""
    theirs = of_vectors.MultipleNegativesRankingLoss(tower, scale=10.0)

    def each() -> Tensor:
        rows = [[[QUERIES[row]], *([column[row]] for column in COLUMNS)] for row in range(4)]
        return torch.stack([theirs(features(tower, row), None) for row in rows]).mean()

    assert_equal(tower, each, lambda: contrastive(signals_of(tower), temperature=0.1))


def test_the_hinge_is_their_triplet_loss(tower: SentenceTransformer) -> None:
    """Guards against a margin on the wrong side."""
    batch = features(tower, [QUERIES, *COLUMNS[:2]])
    metric = of_vectors.TripletDistanceMetric.COSINE
    theirs = of_vectors.TripletLoss(tower, distance_metric=metric, triplet_margin=0.3)
    assert_equal(tower, lambda: theirs(batch, None), lambda: margin_hinge(signals_of(tower, columns=2), margin=0.3))


@pytest.mark.parametrize("name", ["margin_mse", "listwise_kl", "contrastive", "cosine"])
def test_matryoshka_is_theirs(tower: SentenceTransformer, name: str) -> None:
    """Guards against prefixes that keep the whole vectors' scores, and weights that go to another length."""
    inner = {
        "margin_mse": of_vectors.MarginMSELoss(tower),
        "listwise_kl": of_vectors.DistillKLDivLoss(tower),
        "contrastive": of_vectors.MultipleNegativesRankingLoss(tower, scale=20.0),
        "cosine": of_vectors.EmbedDistillLoss(tower, distance_metric="cosine"),
    }[name]
    batch = features(tower, [QUERIES] if name == "cosine" else [QUERIES, *COLUMNS])
    labels = {"cosine": TARGETS[:, 0], "contrastive": None}.get(name, SCORES)
    theirs = of_vectors.MatryoshkaLoss(tower, inner, [8, DIM, 4], [0.5, 1.0, 2.0])
    options = {"contrastive": {"in_batch": True, "temperature": 0.05}}.get(name, {})
    losses = LossesSettings.model_validate(
        {name: {"weight": 1, **options}, "matryoshka": {"dims": [4, 8], "weights": [2.0, 0.5]}}
    )
    ours = compose(losses, student_dim=DIM, teacher_dim=DIM)
    assert_equal(tower, lambda: theirs(batch, labels), lambda: ours(signals_of(tower), 1.0)[0])


def late_signals(late: MultiVectorEncoder) -> Signals:
    """Scores of a late-interaction student."""
    tokens, *columns = [late(one, task=task) for one, task in zip(
        features(late, [QUERIES, *COLUMNS]), ["query", *["document"] * 3], strict=True
    )]  # fmt: skip
    longest = max(one["token_embeddings"].shape[1] for one in columns)

    def padded(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 0) * (values.ndim - 2) + (0, longest - values.shape[1]))

    passages = torch.stack([padded(one["token_embeddings"]) for one in columns], dim=1)
    masks = torch.stack([padded(one["attention_mask"]) for one in columns], dim=1)
    scores = maxsim(tokens["token_embeddings"], tokens["attention_mask"], passages, masks)
    return Signals(student_scores=scores, teacher_scores=SCORES)


def test_losses_of_late_interaction_students_are_theirs(late: MultiVectorEncoder) -> None:
    """Guards against MaxSim over padding, or a student that is trained by another score than it is searched with."""
    batch = features(late, [QUERIES, *COLUMNS])
    divergence = of_tokens.MultiVectorDistillKLDivLoss(late, temperature=2.0)
    margins = of_tokens.MultiVectorMarginMSELoss(late)
    assert_equal(late, lambda: divergence(batch, SCORES), lambda: listwise_kl(late_signals(late), temperature=2.0))
    assert_equal(late, lambda: margins(batch, SCORES), lambda: margin_mse(late_signals(late)))
    ranking = of_tokens.MultiVectorMultipleNegativesRankingLoss(late, scale=2.0)

    def each() -> Tensor:
        rows = [[[QUERIES[row]], *([column[row]] for column in COLUMNS)] for row in range(4)]
        return torch.stack([ranking(features(late, row)) for row in rows]).mean()

    assert_equal(late, each, lambda: contrastive(late_signals(late), temperature=0.5))


def logits_of(pairs: CrossEncoder) -> Tensor:
    columns = [
        pairs(pairs.preprocess(list(zip(QUERIES, column, strict=True))))["scores"].view(-1) for column in COLUMNS
    ]
    return torch.stack(columns, dim=1)


def test_losses_of_rerankers_are_theirs(pairs: CrossEncoder) -> None:
    """Guards against a reranker's loss that is only nearly the one that the library documents."""

    def signals() -> Signals:
        return Signals(student_scores=logits_of(pairs), teacher_scores=SCORES)

    margins, ranking = of_pairs.MarginMSELoss(pairs), of_pairs.ListNetLoss(pairs)
    assert_equal(pairs, lambda: margins([QUERIES, *COLUMNS], SCORES), lambda: margin_mse(signals()))
    lists = [[column[row] for column in COLUMNS] for row in range(4)]
    entropy = -(SCORES.softmax(-1) * SCORES.log_softmax(-1)).sum(-1).mean()
    assert_equal(pairs, lambda: ranking([QUERIES, lists], list(SCORES)), lambda: listwise_kl(signals()) + entropy)
    single = of_pairs.MultipleNegativesRankingLoss(pairs, num_negatives=0, scale=5, activation_fn=None)

    def each() -> Tensor:
        rows = [[[QUERIES[row]], *([column[row]] for column in COLUMNS)] for row in range(4)]
        listed: list[Any] = [[logits_of_row(pairs, row)] for row in rows]
        return torch.stack([single.calculate_loss(one, 1) for one in listed]).mean()

    assert_equal(pairs, each, lambda: contrastive(signals(), temperature=0.2))


def logits_of_row(pairs: CrossEncoder, row: list[list[str]]) -> Tensor:
    batch = [(row[0][0], column[0]) for column in row[1:]]
    scores: Tensor = pairs(pairs.preprocess(batch))["scores"].view(-1)
    return scores
