"""Each loss is its formula, computed number by number; its gradient is that of the formula; its edges are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.references import distillation as slow
from tests.references.signals import MAP, made, some
from torch import Tensor, nn

from stillroom_server.distillery.losses.alignment import Projection, cosine, l2
from stillroom_server.distillery.losses.layers import attention_maps, hidden_states
from stillroom_server.distillery.losses.listwise import contrastive, listwise_kl, soft_hard
from stillroom_server.distillery.losses.margins import margin_hinge, margin_mse
from stillroom_server.distillery.losses.matryoshka import truncated
from stillroom_server.distillery.losses.schedules import Schedule, scheduled
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.losses.tokens import maxsim, pooled, token_alignment, token_pooling
from stillroom_shared.errors import DataError, SettingsError

Loss = Callable[[Signals], Tensor]
WIDER = Projection(4, 6, torch.Generator().manual_seed(3)).double()
nn.init.normal_(WIDER.bias, generator=torch.Generator().manual_seed(4))


def plain(value: Tensor | tuple[Tensor, ...] | None) -> list:  # type: ignore[type-arg]
    """Lists of floats."""
    assert value is not None
    return [one.tolist() for one in value] if isinstance(value, tuple) else value.tolist()


def moved(vectors: list) -> list:  # type: ignore[type-arg]
    """Through `WIDER`, at any depth."""
    if isinstance(vectors[0], list):
        return [moved(one) for one in vectors]
    return slow.projected(vectors, WIDER.weight.tolist(), WIDER.bias.tolist())


def flat(cube: list) -> list:  # type: ignore[type-arg]
    return [vector for matrix in cube for vector in matrix]


def pooled_slowly(s: Signals, attended: bool) -> list[list[float]]:
    rows = zip(
        plain(s.teacher_tokens), plain(s.teacher_mask), plain(s.teacher_passage_tokens), plain(s.teacher_passage_mask),
        strict=True,
    )  # fmt: skip
    return [slow.pooled(e, m, f if attended else None, n, 0.3) for e, m, f, n in rows]


def maps_slowly(s: Signals, distance: str) -> float:
    return slow.attention_maps(plain(s.student_attentions), plain(s.teacher_attentions), plain(s.mask), MAP, distance)


CASES: dict[str, tuple[Loss, Callable[[Signals], float], int]] = {
    "l2": (l2, lambda s: slow.l2(plain(s.student_queries), plain(s.teacher_queries)), 0),
    "l2, both sides, projected": (
        lambda s: l2(s, side="both", project=WIDER),
        lambda s: slow.l2(
            moved(plain(s.student_queries) + flat(plain(s.student_passages))),
            plain(s.teacher_queries) + flat(plain(s.teacher_passages)),
        ),
        6,
    ),
    "cosine": (cosine, lambda s: slow.cosine(plain(s.student_queries), plain(s.teacher_queries)), 0),
    "cosine, passages, projected": (
        lambda s: cosine(s, side="passages", project=WIDER),
        lambda s: slow.cosine(moved(flat(plain(s.student_passages))), flat(plain(s.teacher_passages))),
        6,
    ),
    "margin_mse": (margin_mse, lambda s: slow.margin_mse(plain(s.student_scores), plain(s.teacher_scores)), 0),
    "margin_mse, scaled": (
        lambda s: margin_mse(s, student_scale=7),
        lambda s: slow.margin_mse(plain(7 * some(s.student_scores)), plain(s.teacher_scores)),
        0,
    ),
    "margin_hinge": (
        lambda s: margin_hinge(s, margin=0.7),
        lambda s: slow.margin_hinge(plain(s.student_scores), plain(s.grades), 0.7),
        0,
    ),
    "margin_hinge, no grades": (
        lambda s: margin_hinge(replace(s, grades=None), margin=0.7),
        lambda s: slow.margin_hinge(plain(s.student_scores), None, 0.7),
        0,
    ),
    "listwise_kl": (
        lambda s: listwise_kl(s, temperature=2.5),
        lambda s: slow.listwise_kl(plain(s.student_scores), plain(s.teacher_scores), 2.5),
        0,
    ),
    "contrastive": (
        lambda s: contrastive(s, temperature=0.2),
        lambda s: slow.contrastive(plain(s.student_scores), plain(s.grades), 0.2),
        0,
    ),
    "contrastive, no grades": (
        lambda s: contrastive(replace(s, grades=None), temperature=0.2),
        lambda s: slow.contrastive(plain(s.student_scores), None, 0.2),
        0,
    ),
    "contrastive, in batch": (
        lambda s: contrastive(s, temperature=0.2, in_batch=True),
        lambda s: slow.contrastive_in_batch(plain(s.student_queries), plain(s.student_passages), plain(s.grades), 0.2),
        0,
    ),
    "soft_hard": (
        lambda s: soft_hard(s, alpha=0.3, temperature=2, hard_temperature=0.5, student_scale=4),
        lambda s: (
            0.3 * slow.listwise_kl(plain(4 * some(s.student_scores)), plain(s.teacher_scores), 2)
            + 0.7 * slow.contrastive(plain(4 * some(s.student_scores)), plain(s.grades), 0.5)
        ),
        0,
    ),
    "hidden_states": (
        lambda s: hidden_states(s, layer_map=MAP),
        lambda s: slow.hidden_states(plain(s.student_states), plain(s.teacher_states), plain(s.mask), MAP),
        0,
    ),
    "hidden_states, projected": (
        lambda s: hidden_states(s, layer_map=MAP, project=WIDER),
        lambda s: slow.hidden_states(moved(plain(s.student_states)), plain(s.teacher_states), plain(s.mask), MAP),
        6,
    ),
    **{
        f"attention_maps, {distance}, {'same' if wide else 'other'} heads": (
            partial(attention_maps, layer_map=MAP, distance=distance),
            partial(maps_slowly, distance=distance),
            wide,
        )
        for distance in ("kl", "mse")
        for wide in (0, 6)
    },
    "token_pooling": (
        token_pooling,
        lambda s: slow.cosine(plain(s.student_queries), pooled_slowly(s, attended=False)),
        0,
    ),
    "token_pooling, attended, projected": (
        lambda s: token_pooling(s, pooling="attended", temperature=0.3, project=WIDER),
        lambda s: slow.cosine(moved(plain(s.student_queries)), pooled_slowly(s, attended=True)),
        6,
    ),
    "token_alignment": (
        token_alignment,
        lambda s: slow.token_alignment(plain(s.student_tokens), plain(s.teacher_tokens), plain(s.mask)),
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), k=st.integers(2, 5), tokens=st.integers(1, 4))
def test_a_loss_is_its_formula(name: str, seed: int, batch: int, k: int, tokens: int) -> None:
    """Guards against a mean over the wrong axis, a mask that is applied once, a sign, a factor: all of them train."""
    fast, by_hand, wide = CASES[name]
    signals = made(seed, batch=batch, k=k, tokens=tokens, wide=wide)
    value = fast(signals)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(by_hand(signals), rel=1e-9, abs=1e-12)


READS: dict[str, tuple[str, ...]] = {
    "l2": ("student_queries", "student_passages"),
    "cosine": ("student_queries", "student_passages"),
    "contrastive, in batch": ("student_queries", "student_passages"),
    "hidden_states": ("student_states",),
    "attention_maps": ("student_attentions",),
    "token_pooling": ("student_queries",),
    "token_alignment": ("student_tokens",),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    """Guards against a detached term, and a gradient that enters the teacher."""
    loss, _, wide = CASES[name]
    signals = made(5, batch=2, k=3, tokens=3, wide=wide)
    names = next((read for start, read in READS.items() if name.startswith(start)), ("student_scores",))
    values: dict[str, Any] = {
        one: tuple(x.clone().requires_grad_() for x in v) if isinstance(v, tuple) else v.clone().requires_grad_()
        for one in names
        for v in [getattr(signals, one)]
    }
    inputs = [x for v in values.values() for x in (v if isinstance(v, tuple) else (v,))]

    def of(*given: Tensor) -> Tensor:
        left = iter(given)
        changed: dict[str, Any] = {
            n: tuple(next(left) for _ in v) if isinstance(v, tuple) else next(left) for n, v in values.items()
        }
        return loss(replace(signals, **changed))

    assert torch.autograd.gradcheck(of, inputs, eps=1e-7, atol=1e-5)
    teacher = some(signals.teacher_scores).clone().requires_grad_()
    vectors = some(signals.teacher_queries).clone().requires_grad_()
    total = loss(replace(signals, teacher_scores=teacher, teacher_queries=vectors, **values))
    total.backward()  # type: ignore[no-untyped-call]
    assert any(x.grad is not None and x.grad.abs().max() > 1e-6 for x in inputs), "the guard: it has a gradient"
    assert teacher.grad is None and vectors.grad is None


SCORES: dict[str, Loss] = {
    "margin_mse": margin_mse,
    "margin_hinge": lambda s: margin_hinge(s, margin=1.0),
    "listwise_kl": listwise_kl,
    "contrastive": contrastive,
    "soft_hard": soft_hard,
}


@pytest.mark.parametrize("name", SCORES)
def test_one_candidate_is_refused(name: str) -> None:
    """Guards against a mean over nothing, which is NaN, and a softmax over one, which never learns."""
    with pytest.raises(DataError, match=rf"{name} compares candidates, and a query has 1"):
        SCORES[name](made(0, k=1))


@pytest.mark.parametrize("name", ["margin_mse", "listwise_kl", "soft_hard"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_refused_before_it_reaches_the_student(name: str, bad: float) -> None:
    """One such score in a million makes every weight NaN, an hour later."""
    signals = made(1)
    scores = some(signals.teacher_scores).clone()
    scores[1, 2] = bad
    with pytest.raises(DataError, match=rf"{name}: 1 of 12 values of teacher_scores are NaN or infinite"):
        SCORES[name](replace(signals, teacher_scores=scores))
    with pytest.raises(DataError, match="teacher_queries"):
        cosine(replace(signals, teacher_queries=some(signals.teacher_queries) * bad))


def test_grades_at_their_edges() -> None:
    """Guards against a query without a known answer, or with nothing else, that makes the batch NaN."""
    signals = made(2, batch=3, k=3)
    scores = some(signals.student_scores).requires_grad_()
    grades = torch.tensor([[0, 0, 0], [1, 1, 2], [0, 1, 0]])
    mixed = replace(signals, student_scores=scores, grades=grades)
    value = contrastive(mixed, temperature=0.5)
    value.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert scores.grad[:2].abs().max() == 0 and scores.grad[2].abs().min() > 0
    third = replace(signals, student_scores=scores[2:], grades=grades[2:])
    assert value.item() == pytest.approx(contrastive(third, temperature=0.5).item() / 3)
    nothing = replace(mixed, grades=torch.zeros_like(grades))
    assert contrastive(nothing).item() == 0 and soft_hard(nothing, alpha=0).item() == 0
    assert torch.equal(margin_hinge(nothing, margin=1), margin_hinge(replace(nothing, grades=None), margin=1))
    assert margin_hinge(replace(mixed, grades=torch.ones_like(grades)), margin=9).item() == 0
    with pytest.raises(DataError, match="put it at position 0"):
        margin_hinge(mixed, margin=1)
    with pytest.raises(DataError, match="other lists"):
        contrastive(replace(mixed, grades=grades[:, :2]))


def test_a_teacher_that_knows_no_difference_asks_for_none() -> None:
    """Guards against constant scores (every passage cut off before the answer) that become NaN in a standardisation."""
    signals = replace(made(3), teacher_scores=torch.full((3, 4), 7.0))
    even = replace(signals, student_scores=torch.full((3, 4), -2.0))
    for loss in (margin_mse, listwise_kl):
        assert loss(even).item() == pytest.approx(0, abs=1e-7) and loss(signals).item() > 0.01


def test_in_batch_negatives_are_the_whole_batch_and_none_for_a_batch_of_one() -> None:
    """Guards against in-batch negatives that silently stay the query's own candidates."""
    signals = replace(made(4), grades=None)
    own, whole = contrastive(signals, temperature=0.3), contrastive(signals, temperature=0.3, in_batch=True)
    assert whole > own
    alone = replace(made(4, batch=1), grades=None)
    assert contrastive(alone, in_batch=True).item() == pytest.approx(contrastive(alone).item())
    contrastive(replace(made(4, k=1), grades=None), in_batch=True)
    passages = some(signals.student_passages)
    with pytest.raises(DataError, match="all queries have one list"):
        contrastive(replace(signals, student_passages=passages[:1].expand(3, -1, -1)), in_batch=True)


def test_t_squared_keeps_the_size_of_the_gradient() -> None:
    """Hinton 2015, section 2.1: at high T, T^2 KL is half the mean square of centred scores. Without the factor it vanishes."""
    signals = made(6)
    s, t = some(signals.student_scores), some(signals.teacher_scores)
    apart = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    limit = apart.square().mean(-1).mean() / 2
    assert listwise_kl(signals, temperature=1e4).item() == pytest.approx(limit.item(), rel=1e-3)
    assert listwise_kl(signals, temperature=1.0).item() < 10 * limit.item()


def test_a_student_trained_at_any_temperature_is_the_teacher_at_temperature_one() -> None:
    """Guards against a temperature that softens one side only: the student would need it again at inference."""
    signals = made(7, batch=2, k=3)
    for temperature in (0.5, 1.0, 4.0):
        scores = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(scores: Tensor = scores, t: float = temperature, o: torch.optim.LBFGS = optimizer) -> Tensor:
            o.zero_grad()
            value = listwise_kl(replace(signals, student_scores=scores), temperature=t)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(
            scores.detach().softmax(-1), some(signals.teacher_scores).softmax(-1), atol=1e-4, rtol=0
        )


def test_padding_has_no_part_in_any_loss() -> None:
    """Guards against a student that learns what a teacher's padding looks like."""
    signals = made(8, tokens=4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    signals = replace(signals, mask=mask, teacher_mask=mask)
    hidden = (mask == 0)[..., None]

    def rubbish(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(one.masked_fill(hidden, 1e3) for one in states)

    def looked(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(one.masked_fill((mask == 0)[:, None, None, :] | hidden[:, None], 0.9) for one in maps)

    filled = replace(
        signals,
        student_states=rubbish(signals.student_states),
        teacher_tokens=some(signals.teacher_tokens).masked_fill(hidden, -1e3),
        student_attentions=looked(signals.student_attentions),
        teacher_attentions=looked(signals.teacher_attentions),
    )
    for loss in (
        lambda s: hidden_states(s, layer_map=MAP),
        lambda s: attention_maps(s, layer_map=MAP),
        lambda s: attention_maps(s, layer_map=MAP, distance="mse"),
        token_pooling,
        lambda s: token_pooling(s, pooling="attended"),
        token_alignment,
    ):
        assert loss(filled).item() == pytest.approx(loss(signals).item())
        nobody = replace(signals, mask=torch.zeros_like(mask), teacher_mask=torch.zeros_like(mask))
        assert math.isfinite(loss(nobody))
    assert hidden_states(nobody, layer_map=MAP).item() == 0


def test_a_probability_of_zero_is_far_away_and_finite() -> None:
    """Guards against the logarithm of an attention probability that underflowed."""
    signals = made(9, tokens=2, wide=6)
    ours = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 2, 2, 2).clone().requires_grad_()
    signals = replace(signals, student_attentions=(ours,), mask=torch.ones(3, 2))
    value = attention_maps(signals, layer_map=(1,))
    value.backward()  # type: ignore[no-untyped-call]
    assert 50 < value.item() < 1e3 and ours.grad is not None and torch.isfinite(ours.grad).all()


def test_maxsim_is_the_sum_of_the_best(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against padding that wins a maximum over negative similarities, and candidates of the wrong query."""
    generator = torch.Generator().manual_seed(1)
    query, passages = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 2, 6, 5, generator=generator)
    query_mask, passage_mask = torch.ones(3, 4), torch.ones(3, 2, 6)
    query_mask[1, 2:] = passage_mask[0, 1, 1:] = 0
    query.requires_grad_()
    found = maxsim(query, query_mask, passages, passage_mask)
    assert found.shape == (3, 2) and found.dtype == torch.float32
    for b in range(3):
        for j in range(2):
            by_hand = slow.maxsim(
                plain(query[b]), plain(query_mask[b]), plain(passages[b, j]), plain(passage_mask[b, j])
            )
            assert found[b, j].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None and query.grad[1, 2:].abs().max() == 0 and query.grad[1, :2].abs().min() > 0
    passage_mask[2, 0] = 0
    assert maxsim(query, query_mask, passages, passage_mask)[2, 0] < found.min() - 1e3, "an empty passage is the last"


def test_pooled_tokens_bound_maxsim_and_attention_fades_with_temperature() -> None:
    """Guards against weights over the wrong axis: the bound mean <= max would break, or the limit would not be the mean."""
    s = made(10, batch=4, tokens=5)
    e, m, f, n = (some(x) for x in (s.teacher_tokens, s.teacher_mask, s.teacher_passage_tokens, s.teacher_passage_mask))
    middle = pooled(e, m)
    best = maxsim(e.float(), m, f.float()[:, None], n[:, None])[:, 0]
    assert ((middle * pooled(f, n)).sum(-1) <= best / m.sum(-1) + 1e-6).all()
    torch.testing.assert_close(pooled(e, m, f, n, temperature=1e6), middle, atol=1e-5, rtol=0)
    assert pooled(e, torch.zeros_like(m), f, n).abs().max() == 0, "no token, no direction"
    sharp = pooled(e, m, f, n, temperature=1e-4)
    assert ((sharp[:, None] - e).norm(dim=-1).amin(-1) < 1e-3).all(), "one token alone answers"


@given(dim=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_truncated_signals_are_shorter_unit_vectors_with_their_own_scores(dim: int, seed: int) -> None:
    """Guards against prefixes that are ranked by the whole vectors' scores, or keep a length below 1."""
    whole = made(seed, dim=4)
    short = truncated(whole, dim)
    for name in ("student_queries", "teacher_queries"):
        by_hand = [slow.truncated(vector, dim) for vector in plain(getattr(whole, name))]
        torch.testing.assert_close(getattr(short, name), torch.tensor(by_hand, dtype=torch.float64))
    for b, query in enumerate(plain(whole.student_queries)):
        for j, passage in enumerate(plain(whole.student_passages)[b]):
            score = slow.dot(slow.truncated(query, dim), slow.truncated(passage, dim))
            assert some(short.student_scores)[b, j].item() == pytest.approx(score)
    longer = truncated(made(seed, dim=4, wide=6), dim)
    assert some(longer.teacher_queries).shape[-1] == 6, "a teacher of another length stays whole"


def test_one_list_for_all_queries_is_never_copied() -> None:
    """Guards against a corpus that is held once for each query of a batch, and each length: memory is what it costs."""
    signals = made(13)
    corpus = some(signals.student_passages)[0]
    one = truncated(replace(signals, student_passages=corpus.expand(3, -1, -1)), 2)
    many = truncated(replace(signals, student_passages=corpus.repeat(3, 1, 1)), 2)
    assert some(one.student_passages).untyped_storage().nbytes() == corpus[:, :2].numel() * 8
    torch.testing.assert_close(one.student_passages, many.student_passages)
    torch.testing.assert_close(one.student_scores, many.student_scores)


def test_a_prefix_goes_through_the_first_columns_of_the_projection() -> None:
    """Guards against a projection that takes prefixes of another space: it must be that of zeros in their place."""
    vectors = torch.randn(3, 4, dtype=torch.float64)
    padded = torch.cat([vectors[:, :2], torch.zeros(3, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(WIDER(vectors[:, :2]), WIDER(padded))


@given(
    schedule=st.sampled_from(("constant", "linear", "cosine")),
    progress=st.floats(0, 1),
    start=st.floats(0, 5),
    end=st.floats(0, 5),
    warmup=st.sampled_from((0.0, 0.1, 0.5)),
)
@settings(max_examples=150, deadline=None)
def test_a_schedule_is_its_formula(
    schedule: Schedule, progress: float, start: float, end: float, warmup: float
) -> None:
    """Guards against a schedule that starts at its end, or jumps after the warm-up."""
    value = scheduled(schedule, progress, start=start, end=end, warmup=warmup)
    assert value == pytest.approx(slow.scheduled(schedule, progress, start, end, warmup), abs=1e-9)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_training_is_refused(progress: float) -> None:
    """Guards against steps that are given where a share is meant: every weight would be that of the end, or beyond."""
    with pytest.raises(SettingsError, match="share of steps"):
        scheduled("linear", progress, start=0, end=1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(half: torch.dtype) -> None:
    """Guards against a divergence of the order of the rounding error, which is noise with a negative sign."""
    signals = made(11)
    narrow = replace(signals, student_scores=some(signals.student_scores).to(half))
    value = listwise_kl(narrow)
    assert value.dtype == torch.float32
    exact = listwise_kl(replace(narrow, student_scores=some(narrow.student_scores).double()))
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_signals_of_other_shapes_are_refused() -> None:
    """Guards against broadcasting: (batch, k) minus (batch, 1) trains, on nonsense."""
    signals = made(12)
    wrong: list[tuple[str, Loss, Signals]] = [
        (
            "teacher_scores has the shape",
            margin_mse,
            replace(signals, teacher_scores=some(signals.teacher_scores)[:, :1]),
        ),
        ("a projection is missing", cosine, made(12, wide=6)),
        ("same tokenizer", lambda s: hidden_states(s, layer_map=MAP), made(12, wide=6)),
        ("is not for 3 states", lambda s: hidden_states(s, layer_map=(0, 1)), signals),
        ("is not for 3 attentions", lambda s: attention_maps(s, layer_map=(0, 1, 4)), signals),
        ("teacher_tokens has the shape", token_alignment, replace(signals, teacher_tokens=torch.zeros(3, 2, 4))),
    ]
    for message, loss, given_signals in wrong:
        with pytest.raises(DataError, match=message):
            loss(given_signals)
