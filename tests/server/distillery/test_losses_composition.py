"""A composition is a weighted sum that is refused, with a remedy, before it could do something else than what was asked for."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.references import distillation as slow
from tests.references.signals import MAP, made, some
from torch import Tensor, nn

from stillroom_server.distillery.losses.alignment import cosine, l2
from stillroom_server.distillery.losses.checks import given
from stillroom_server.distillery.losses.composition import Composition, compose
from stillroom_server.distillery.losses.layers import attention_maps, hidden_states
from stillroom_server.distillery.losses.listwise import contrastive, listwise_kl, soft_hard
from stillroom_server.distillery.losses.margins import margin_hinge, margin_mse
from stillroom_server.distillery.losses.matryoshka import inner_products, truncated
from stillroom_server.distillery.losses.settings import LossesSettings, Weighted
from stillroom_server.distillery.losses.signals import Signals
from stillroom_server.distillery.losses.tokens import token_alignment, token_pooling
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings_file import fields as all_settings
from stillroom_shared.settings_file import load

SIZES: dict[str, Any] = {
    "student_dim": 4, "teacher_dim": 4, "token_dims": (4, 4), "layers": (2, 3), "widths": (4, 4), "candidates": 4,
}  # fmt: skip
LOSSES = [name for name, group in LossesSettings() if isinstance(group, Weighted)]


def composed(overrides: dict[str, str], **sizes: Any) -> Composition:
    return compose(load(LossesSettings(), None, overrides), **{**SIZES, **sizes})


def every_loss(signals: Signals) -> dict[str, Tensor]:
    """With the default options and this map of layers."""
    return {
        "l2": l2(signals),
        "cosine": cosine(signals),
        "margin_mse": margin_mse(signals),
        "margin_hinge": margin_hinge(signals, margin=0.2),
        "listwise_kl": listwise_kl(signals),
        "contrastive": contrastive(signals),
        "soft_hard": soft_hard(signals),
        "hidden_states": hidden_states(signals, layer_map=(0, 2, 3)),
        "attention_maps": attention_maps(
            replace(signals, student_attentions=signals.student_attentions[:2]), layer_map=(1, 2)
        ),
        "token_pooling": token_pooling(signals),
        "token_alignment": token_alignment(signals),
    }


def test_the_total_is_the_weighted_sum_of_all_losses() -> None:
    """Guards against a name in the settings that meets another function, and a loss that the sum has not."""
    signals = made(1)
    expected = every_loss(signals)
    assert list(expected) == LOSSES
    composition = composed({f"{name}.weight": str(number + 1) for number, name in enumerate(LOSSES)})
    scores = some(signals.student_scores).clone().requires_grad_()
    signals = replace(signals, student_attentions=signals.student_attentions[:2], student_scores=scores)
    total, told = composition(signals, 0.3)
    assert {name: value.item() for name, value in told.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    weighted = sum((number + 1) * expected[name].item() for number, name in enumerate(LOSSES))
    assert total.item() == pytest.approx(weighted) and total.requires_grad
    assert not any(value.requires_grad for value in told.values())
    assert composition.weights(0.3) == {name: number + 1 for number, name in enumerate(LOSSES)}


def test_settings_reach_the_losses() -> None:
    """Guards against an option that is read, checked, documented, and not passed on."""
    signals = made(2)
    options: dict[str, tuple[dict[str, str], Tensor]] = {
        "l2": ({"side": "both"}, l2(signals, side="both")),
        "cosine": ({"side": "passages"}, cosine(signals, side="passages")),
        "margin_mse": ({"student_scale": "5"}, margin_mse(signals, student_scale=5)),
        "margin_hinge": ({"margin": "2"}, margin_hinge(signals, margin=2)),
        "listwise_kl": (
            {"temperature": "3", "student_scale": "2"},
            listwise_kl(signals, temperature=3, student_scale=2),
        ),
        "contrastive": (
            {"temperature": "0.3", "in_batch": "true"},
            contrastive(signals, temperature=0.3, in_batch=True),
        ),
        "soft_hard": (
            {"alpha": "0.2", "temperature": "3", "hard_temperature": "0.5", "student_scale": "2"},
            soft_hard(signals, alpha=0.2, temperature=3, hard_temperature=0.5, student_scale=2),
        ),
        "hidden_states": ({"layer_map": "-1,2,0"}, hidden_states(signals, layer_map=MAP)),
        "attention_maps": (
            {"layer_map": "-1,2,0", "distance": "mse"},
            attention_maps(signals, layer_map=MAP, distance="mse"),
        ),
        "token_pooling": (
            {"pooling": "attended", "temperature": "0.3"},
            token_pooling(signals, pooling="attended", temperature=0.3),
        ),
    }
    listed = {key.partition(".")[0] for key, _ in all_settings(LossesSettings)} - {"matryoshka", "token_alignment"}
    assert set(options) == listed
    for name, (chosen, expected) in options.items():
        known = {key.partition(".")[2] for key, _ in all_settings(LossesSettings) if key.startswith(f"{name}.")}
        left = known - set(Weighted.model_fields) - set(chosen)
        assert left <= {"start_margin", "margin_schedule"}, f"{name}: {left} is not tested"
        layers = (3, 3) if name == "attention_maps" else (2, 3)
        composition = composed({f"{name}.weight": "1", **{f"{name}.{k}": v for k, v in chosen.items()}}, layers=layers)
        assert composition(signals, 1.0)[0].item() == pytest.approx(expected.item()), name
        assert expected.item() != pytest.approx(every_loss(signals)[name].item()), f"the guard: {name}'s options matter"


def test_weights_and_margins_follow_their_schedules() -> None:
    """Guards against a schedule that is evaluated once, at the start."""
    signals = made(3)
    composition = composed(
        {
            "margin_hinge.weight": "1", "margin_hinge.margin": "2", "margin_hinge.start_margin": "0.5",
            "margin_hinge.margin_schedule": "linear",
            "cosine.weight": "0", "cosine.start_weight": "4", "cosine.schedule": "cosine", "cosine.warmup": "0.5",
        }
    )  # fmt: skip
    aligned = cosine(signals)
    for progress, margin, weight in (
        (0.0, 0.5, 0.0),
        (0.25, 0.875, 2.0),
        (0.5, 1.25, 4.0),
        (0.75, 1.625, 2.0),
        (1, 2, 0),
    ):
        total, told = composition(signals, progress)
        assert told["margin_hinge"].item() == pytest.approx(margin_hinge(signals, margin=margin).item())
        assert total.item() == pytest.approx((told["margin_hinge"] + weight * aligned).item())
    with pytest.raises(SettingsError, match=r"from 0 to 1"):
        composition(signals, 17)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_missing_is_refused_before_the_first_batch(name: str) -> None:
    """Guards against a run that fails after an hour of preparation, and a message that names no remedy."""
    composition = composed({f"{name}.weight": "1"})
    everything = made(4)
    if name == "attention_maps":
        everything = replace(everything, student_attentions=everything.student_attentions[:2])
    composition.check(set(composition.needs))
    composition(
        Signals(**{signal: getattr(everything, signal) for signal in composition.needs}), 1.0
    )  # what it needs is enough
    for signal in composition.needs:
        with pytest.raises(SettingsError, match=rf"loss {name} needs {signal}, .*: take .*, or set {name}.weight to 0"):
            composition.check(set(composition.needs) - {signal})
        nothing: Any = () if signal.endswith(("states", "attentions")) else None
        without = replace(everything, **{signal: nothing})
        assert given(everything) - given(without) == {signal}
        with pytest.raises(SettingsError, match=signal):
            composition(without, 1.0)


def test_options_that_read_more_need_more() -> None:
    """Guards against a check that knows a loss and not its options: the refusal would come in the middle of a run."""
    attended = composed({"token_pooling.weight": "1", "token_pooling.pooling": "attended"})
    assert {"teacher_passage_tokens", "teacher_passage_mask"} <= attended.needs
    both = composed({"l2.weight": "1", "l2.side": "both"})
    assert both.needs == {"student_queries", "student_passages", "teacher_queries", "teacher_passages"}
    assert composed({"contrastive.weight": "1", "contrastive.in_batch": "true"}).needs == {
        "student_queries",
        "student_passages",
    }


def test_a_part_of_a_composition_trains_the_same_projections() -> None:
    """Guards against texts and lists that each learn a projection of their own, one of which no optimizer knows."""
    whole = composed({"cosine.weight": "1", "listwise_kl.weight": "1"}, teacher_dim=6)
    texts = whole.restricted({"student_queries", "teacher_queries"})
    assert texts is not None and texts.needs == {"student_queries", "teacher_queries"}
    assert [id(x) for x in texts.parameters()] == [id(x) for x in whole.parameters()]
    assert whole.restricted({"student_scores"}) is None


def test_every_missing_signal_is_named_at_once() -> None:
    """Guards against one refusal a run."""
    composition = composed({"cosine.weight": "1", "margin_mse.weight": "1"})
    with pytest.raises(SettingsError) as refused:
        composition.check({"student_queries", "student_scores"})
    lines = str(refused.value).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "loss cosine needs teacher_queries",
        "loss margin_mse needs teacher_scores",
    ]


WEIGHTS = {"cosine.weight": "1", "margin_mse.weight": "0.5", "token_pooling.weight": "2", "hidden_states.weight": "1"}


def test_matryoshka_adds_prefixes_to_losses_of_vectors() -> None:
    """Guards against a prefix that counts for hidden states, or pooled targets told from shortened tokens."""
    signals = made(5)
    chosen = {**WEIGHTS, "token_pooling.pooling": "attended", "matryoshka.dims": "2,3", "matryoshka.weights": "0.5,3"}
    total, told = composed(chosen)(signals, 1.0)
    plain, whole = composed({**WEIGHTS, "token_pooling.pooling": "attended"})(signals, 1.0)
    assert set(told) == {
        *whole,
        *(f"{name}@{dim}" for name in ("cosine", "margin_mse", "token_pooling") for dim in (2, 3)),
    }
    added = sum(
        factor * (told[f"cosine@{dim}"] + 0.5 * told[f"margin_mse@{dim}"] + 2 * told[f"token_pooling@{dim}"])
        for dim, factor in ((2, 0.5), (3, 3.0))
    )
    assert total.item() == pytest.approx((plain + added).item())
    assert told["cosine@2"].item() == pytest.approx(cosine(truncated(signals, 2)).item())
    from stillroom_server.distillery.losses.tokens import with_pooled_teacher

    target = with_pooled_teacher(signals, pooling="attended", temperature=0.1)
    assert told["token_pooling@3"].item() == pytest.approx(cosine(truncated(target, 3)).item())


@pytest.mark.parametrize("corpus", [False, True])
def test_a_shortened_student_follows_the_ranking_of_the_whole_teacher(corpus: bool) -> None:
    """Guards against a teacher that is shortened too: what its first values get wrong would be learned."""
    signals = made(11)
    assert signals.student_passages is not None and signals.teacher_queries is not None
    if corpus:  # one list for all queries, and the teacher's scores its own products
        passages = signals.student_passages[0]
        signals = replace(
            signals,
            student_passages=passages.expand(len(signals.student_passages), -1, -1),
            student_scores=some(signals.student_queries) @ passages.T,
            teacher_scores=signals.teacher_queries @ passages.T,
        )
    chosen = {"listwise_kl.weight": "1", "listwise_kl.temperature": "0.5", "matryoshka.dims": "2"}
    told = composed(chosen)(signals, 1.0)[1]
    queries, lists = some(signals.student_queries).tolist(), some(signals.student_passages).tolist()
    short = [
        [slow.dot(slow.truncated(query, 2), slow.truncated(passage, 2)) for passage in own]
        for query, own in zip(queries, lists, strict=True)
    ]
    whole = some(signals.teacher_scores).tolist()
    assert told["listwise_kl@2"].item() == pytest.approx(slow.listwise_kl(short, whole, 0.5))


@pytest.mark.parametrize(
    ("chosen", "sizes", "message"),
    [
        ({}, {}, r"no loss has a weight: set one of l2.weight, cosine.weight"),
        ({"cosine.weight": "1", "matryoshka.dims": "2,4"}, {}, r"dims \(2, 4\): give lengths below 4"),
        ({"hidden_states.weight": "1", "matryoshka.dims": "2"}, {}, r"hidden_states reads no vectors: leave it empty"),
        ({"margin_mse.weight": "1"}, {"candidates": 1}, r"margin_mse compares candidates, and lists have 1"),
        ({"cosine.weight": "1"}, {"teacher_dim": None}, r"cosine needs teacher_queries.*bi-encoder"),
        ({"hidden_states.weight": "1"}, {"layers": None}, r"hidden_states needs teacher_states"),
        ({"attention_maps.weight": "1"}, {"layers": None}, r"attention_maps needs teacher_attentions.*eager"),
        ({"token_pooling.weight": "1"}, {"token_dims": None}, r"token_pooling needs teacher_tokens.*late-interaction"),
        ({"token_alignment.weight": "1"}, {"token_dims": None}, r"token_alignment needs teacher_tokens"),
        (
            {"hidden_states.weight": "1", "hidden_states.layer_map": "0,4"},
            {},
            r"layer_map \(0, 4\): .* student's 3, from 0 to 3",
        ),
        (
            {"attention_maps.weight": "1", "attention_maps.layer_map": "-1,-1"},
            {},
            r"layer_map \(-1, -1\): .*not only -1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_composed(
    chosen: dict[str, str], sizes: dict[str, Any], message: str
) -> None:
    """Guards against settings that are taken and mean nothing."""
    with pytest.raises(SettingsError, match=message):
        composed(chosen, **sizes)


def test_scores_that_are_no_inner_products_cannot_be_shortened() -> None:
    """Guards against a reranker whose 128 first values are trained to nothing, silently."""
    composition = composed({"listwise_kl.weight": "1", "matryoshka.dims": "2"}, student_dim=4)
    assert composition.needs == {"student_scores", "teacher_scores", "student_queries", "student_passages"}
    with pytest.raises(
        SettingsError, match=r"matryoshka.dims over loss listwise_kl needs student_passages: scores of shorter"
    ):
        composition.check({"student_scores", "teacher_scores", "student_queries"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cosine.wieght": "1"}, "did you mean cosine.weight"),
        ({"cosine.weight": "-1"}, "at least 0"),
        ({"listwise_kl.temperature": "0"}, "above 0"),
        ({"soft_hard.alpha": "1.5"}, "at most 1"),
        ({"l2.warmup": "1"}, "below 1"),
        ({"l2.side": "left"}, "queries or passages or both"),
        ({"matryoshka.dims": "8,8"}, "settings of matryoshka: .*each length once"),
        ({"matryoshka.dims": "8", "matryoshka.weights": "1,2"}, "give one for each"),
        ({"matryoshka.dims": "0"}, "matryoshka.dims"),
    ],
)
def test_settings_are_a_closed_set_with_bounds(overrides: dict[str, str], message: str) -> None:
    """Guards against a misspelt weight, which leaves its loss off."""
    with pytest.raises(SettingsError, match=message):
        load(LossesSettings(), None, overrides)


def test_settings_come_from_a_file_and_each_says_what_it_is(tmp_path: Path) -> None:
    """Guards against an option that only its author can read."""
    file = tmp_path / "losses.toml"
    file.write_text("[margin_hinge]\nweight = 1.0\nmargin_schedule = 'cosine'\n[matryoshka]\ndims = [2]\n")
    assert [name for name, _ in load(LossesSettings(), file, {}).active()] == ["margin_hinge"]
    assert not list(LossesSettings().active()), "every loss is off until it is named"
    for key, field in all_settings(LossesSettings):
        assert field.description, key


PROJECTED = {
    "l2.weight": "1", "cosine.weight": "1", "token_pooling.weight": "1", "token_alignment.weight": "1",
    "hidden_states.weight": "1", "hidden_states.warmup": "0.5",
}  # fmt: skip
WIDER: dict[str, Any] = {"teacher_dim": 6, "token_dims": (4, 6), "widths": (4, 6)}


def test_projections_are_learned_shared_and_drawn_from_the_seed() -> None:
    """Guards against a projection that no optimizer sees, one for each loss, and a draw that moves the global generator."""
    state = torch.random.get_rng_state()
    composition = composed(PROJECTED, **WIDER).double()
    assert torch.equal(torch.random.get_rng_state(), state)
    again, other = (compose(load(LossesSettings(), None, PROJECTED), **{**SIZES, **WIDER}, seed=s) for s in (0, 1))
    names = {
        f"projections.{name}.{part}"
        for name in ("vectors", "pooled", "tokens", "states")
        for part in ("weight", "bias")
    }
    assert set(composition.state_dict()) == names, "l2 and cosine share one"
    first, same, another = (one.state_dict()["projections.vectors.weight"] for one in (again, composition, other))
    torch.testing.assert_close(first.T @ first, torch.eye(4), msg="angles are kept at first")
    assert torch.equal(first.double(), same) and not torch.equal(first, another)
    total, _ = composition(made(6, wide=6), 0.0)
    total.backward()
    assert all(x.grad is not None for x in composition.parameters()), "also where the weight is 0 now"
    assert not list(composed(PROJECTED).parameters()), "none where sizes agree"
    copied = copy.deepcopy(composition)
    with torch.no_grad():
        for x in copied.parameters():
            x.zero_()
    assert copied(made(6, wide=6), 1.0)[0] != composition(made(6, wide=6), 1.0)[0], "a copy uses its own"


def test_a_projected_alignment_is_learned() -> None:
    """Guards against a projection with no part in the loss: a rotated, longer teacher can be matched exactly."""
    signals = made(7, batch=6)
    turn = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64))[0]
    assert signals.student_queries is not None
    signals = replace(signals, teacher_queries=signals.student_queries @ turn.T)
    composition = composed({"l2.weight": "1"}, teacher_dim=6).double()
    optimizer = torch.optim.Adam(composition.parameters(), lr=0.05)
    before = composition(signals, 0.0)[0].item()
    for step in range(200):
        optimizer.zero_grad()
        loss, _ = composition(signals, step / 200)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 < 0.1 < before


def test_nothing_of_the_temperature_is_left_in_the_student() -> None:
    """Guards against a student that has to be divided by T at inference: it is told the teacher's scores as they are."""
    signals = made(9, batch=2, k=3)
    student = nn.Linear(4, 4).double()
    names = set(student.state_dict())
    assert signals.teacher_scores is not None and signals.student_queries is not None
    passages = signals.student_passages
    assert passages is not None
    composition = composed({"listwise_kl.weight": "1", "listwise_kl.temperature": "4"})
    optimizer = torch.optim.LBFGS(
        student.parameters(), max_iter=400, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def scores() -> Tensor:
        return inner_products(student(signals.student_queries), passages)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = composition(replace(signals, student_scores=scores()), 0.5)[0]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(scores().softmax(-1), signals.teacher_scores.softmax(-1), atol=1e-3, rtol=0)
    assert set(student.state_dict()) == names and not composition.state_dict()


def test_every_signal_has_a_remedy() -> None:
    """Guards against a signal that is added, and a refusal that fails itself."""
    from stillroom_server.distillery.losses.checks import missing

    for field in fields(Signals):
        assert "take" in missing("l2", field.name)
