"""Pruning: what is removed is what matters least, and what is left computes what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.students.export import folded
from stillroom_server.distillery.students.importance import importance, outputs
from stillroom_server.distillery.students.iterate import prune_iteratively, prune_once
from stillroom_server.distillery.students.magnitude import held, masks_of, prune_magnitude, sparsity
from stillroom_server.distillery.students.pruning import Counts, Kept, choose, counts_of, prune_structured, remove
from stillroom_server.distillery.students.settings import PruningSettings
from stillroom_server.distillery.students.shaped import ShapedBertModel, is_plain
from stillroom_server.distillery.students.size import size_of
from stillroom_server.distillery.students.towers import Model, bert_of, layers_of
from stillroom_server.publish import publish_release
from stillroom_shared.adapter import AdapterSpec
from stillroom_shared.errors import DataError, ReleaseError, SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey

TEXTS = ["what do tapirs eat", "open a zip file and list its members", "river", "sort the array", "how do i search"]
PAIRS = [(text, "A tapir eats leaves.") for text in TEXTS]
HEADS: Kept = ((0, 2, 3), (1,))
NEURONS: Kept = (tuple(range(0, 40)), tuple(range(7, 64, 2)))
EVEN: Kept = (tuple(range(24)), tuple(range(40, 64)))
ALL_HEADS: Kept = ((0, 1, 2, 3),) * 2
ALL_NEURONS: Kept = (tuple(range(64)),) * 2


@pytest.fixture(scope="module")
def student(tiny_release: Release) -> SentenceTransformer:
    """The document tower with four heads in a layer, of 8 dimensions each."""
    model = SentenceTransformer(str(tiny_release.folder / "document"), device="cpu")
    for layer in layers_of(bert_of(model)):
        layer.attention.self.num_attention_heads, layer.attention.self.attention_head_size = 4, 8
        layer.attention.self.scaling = 8**-0.5
    bert_of(model).config.num_attention_heads = 4
    return model


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> CrossEncoder:
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 1
    torch.manual_seed(2)
    folder = str(tmp_path_factory.mktemp("scorer"))
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    model: CrossEncoder = CrossEncoder(folder, device="cpu", local_files_only=True)
    return model


def masked(tower: BertModel, heads: Kept, neurons: Kept) -> BertModel:
    """The slow twin of `remove`: everything is computed, and what is not kept is multiplied by zero."""
    whole = copy.deepcopy(tower)
    with torch.no_grad():
        for layer, own_heads, own_neurons in zip(layers_of(whole), heads, neurons, strict=True):
            for head in set(range(4)) - set(own_heads):
                layer.attention.output.dense.weight[:, 8 * head : 8 * head + 8] = 0
            for neuron in set(range(64)) - set(own_neurons):
                layer.output.dense.weight[:, neuron] = 0
    return whole


def states(tower: BertModel) -> torch.Tensor:
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.inference_mode():
        return tower(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("heads", "neurons"), [(HEADS, NEURONS), (ALL_HEADS, EVEN), (((1, 2),) * 2, ALL_NEURONS)])
def test_removing_equals_masking(student: SentenceTransformer, heads: Kept, neurons: Kept, tmp_path: Path) -> None:
    """Guards against rows cut where columns should be, the scale of another head size, and a folder that loads as another."""
    tower = bert_of(student)
    smaller = remove(tower, heads, neurons)
    torch.testing.assert_close(states(smaller), states(masked(tower, heads, neurons)), atol=2e-6, rtol=0)
    assert (states(smaller) - states(tower)).abs().max() > 1e-2, "the guard: it matters what is removed"
    cut = sum(p.numel() for p in tower.parameters()) - sum(p.numel() for p in smaller.parameters())
    gone = sum(4 - len(own) for own in heads), sum(64 - len(own) for own in neurons)
    assert cut == gone[0] * 8 * (4 * 32 + 3) + gone[1] * (2 * 32 + 1)
    model = prune_structured(student, PruningSettings(heads=0.0, neurons=0.0), TEXTS)
    model[0].model = smaller
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=2e-6)
    assert type(bert_of(loaded)) is (BertModel if heads == ALL_HEADS and neurons == EVEN else ShapedBertModel)


def test_what_says_nothing_is_removed_without_a_trace(student: SentenceTransformer) -> None:
    """Guards against importance of the wrong head or neuron: those whose output is zero must go first, at no loss."""
    quiet = copy.deepcopy(student)
    with torch.no_grad():
        silent = ((2, slice(3, 19)), (0, slice(40, 56)))
        for layer, (head, neurons) in zip(layers_of(bert_of(quiet)), silent, strict=True):
            layer.attention.self.value.weight[8 * head : 8 * head + 8] = 0
            layer.attention.self.value.bias[8 * head : 8 * head + 8] = 0
            layer.intermediate.dense.weight[neurons] = 0
            layer.intermediate.dense.bias[neurons] = 0
    for settings, targets in (
        (PruningSettings(heads=0.25, neurons=0.25), None),
        (PruningSettings(heads=0.25, neurons=0.25, criterion="taylor"), student.encode(TEXTS)),
        (PruningSettings(heads=0.25, neurons=0.25, scope="model"), None),
    ):
        smaller = prune_structured(quiet, settings, TEXTS, targets)
        np.testing.assert_allclose(smaller.encode(TEXTS), quiet.encode(TEXTS), atol=2e-6)
        assert size_of(smaller).attention < size_of(quiet).attention
        assert size_of(smaller).feed_forward < size_of(quiet).feed_forward


def test_importance_is_what_closing_a_gate_does(student: SentenceTransformer) -> None:
    """Guards against gates on the wrong axis, texts that cancel out, and padding that counts: compared with differences."""
    targets = student.encode(["zip"] * len(TEXTS), convert_to_numpy=True)
    found = importance(student, TEXTS, criterion="taylor", targets=targets)
    step = 1e-2
    twin = copy.deepcopy(student)

    def losses(layer: int, columns: slice, factor: float) -> torch.Tensor:
        weight = layers_of(bert_of(twin))[layer].attention.output.dense.weight
        with torch.no_grad():
            before = weight[:, columns].clone()
            weight[:, columns] *= factor
            own = [1 - torch.cosine_similarity(outputs(twin, [t])[0], torch.tensor(targets[0]), dim=0) for t in TEXTS]
            weight[:, columns] = before
        return torch.stack(own)

    for layer, head in ((0, 1), (1, 3)):
        columns = slice(8 * head, 8 * head + 8)
        slope = (losses(layer, columns, 1 + step) - losses(layer, columns, 1 - step)) / (2 * step)
        assert float(found.heads[layer][head]) == pytest.approx(float(slope.abs().mean()), rel=0.02)
    assert [len(own) for own in found.neurons] == [64, 64]


def test_sensitivity_is_the_squared_move_of_the_output(student: SentenceTransformer) -> None:
    """Guards against a criterion that is zero where nothing is to be imitated: measured against the exact Jacobian."""
    text = TEXTS[1]
    seeds = [importance(student, [text], criterion="sensitivity", seed=seed).heads for seed in range(60)]
    estimate = torch.stack([torch.cat(heads) for heads in seeds])  # (seeds, heads)
    exact = []
    twin, step = copy.deepcopy(student), 1e-2
    for layer in range(2):
        weight = layers_of(bert_of(twin))[layer].attention.output.dense.weight
        for head in range(4):
            own = weight[:, 8 * head : 8 * head + 8]
            with torch.no_grad():
                before, moved = own.clone(), []
                for factor in (1 + step, 1 - step):
                    own.copy_(before * factor)
                    moved.append(outputs(twin, [text])[0])
                own.copy_(before)
            exact.append(float(((moved[0] - moved[1]) / (2 * step)).square().sum()))
    error = estimate.std(0) / 60**0.5
    assert bool(((estimate.mean(0) - torch.tensor(exact)).abs() < 4 * error + 1e-4).all())
    assert not bool(((estimate.mean(0) - 2 * torch.tensor(exact)).abs() < 4 * error).all()), "a wrong factor is seen"


def test_padding_does_not_count(student: SentenceTransformer) -> None:
    """Guards against importance that depends on which texts share a batch."""
    targets = student.encode(["zip"], convert_to_numpy=True).repeat(len(TEXTS), 0)
    together = importance(student, TEXTS, criterion="taylor", targets=targets)
    alone = [importance(student, [text], criterion="taylor", targets=targets[:1]) for text in TEXTS]
    mean = torch.stack([one.neurons[1] for one in alone]).mean(0)
    torch.testing.assert_close(together.neurons[1], mean, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("fields", [{"neurons": 0.5}, {"heads": 0.5, "neurons": 0.25}])
def test_rerankers_are_pruned_alike(scorer: CrossEncoder, fields: dict[str, float], tmp_path: Path) -> None:
    """Guards against a config of the head that still says the old shape: the folder would not load."""
    smaller = prune_structured(
        scorer, PruningSettings(**fields, criterion="taylor"), PAIRS, np.zeros(len(PAIRS), np.float32)
    )
    assert size_of(smaller).parameters < size_of(scorer).parameters
    smaller.save_pretrained(str(tmp_path))
    loaded = CrossEncoder(str(tmp_path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(loaded.predict(PAIRS), smaller.predict(PAIRS), atol=1e-5)
    assert is_plain(bert_of(loaded).config) == ("heads" not in fields)


def test_at_least_one_of_each_is_left() -> None:
    """Guards against a layer without heads, which no attention can compute."""
    scores = [torch.ones(4), torch.zeros(4)]
    assert choose(scores, 0.99, "layer") == ((0,), (0,))
    assert choose(scores, 0.99, "model") == ((0,), (0,))
    assert choose(scores, 0.5, "model") == ((0, 1, 2), (0,))
    assert choose(scores, 0.0, "model") == (tuple(range(4)),) * 2


def test_small_weights_become_zero_and_stay_so_while_training(student: SentenceTransformer, tmp_path: Path) -> None:
    """Guards against masks that end with the pruning, zeros that weight decay or momentum move, and masks in the folder."""
    sparse = prune_magnitude(student, 0.6)
    weights = torch.cat(
        [p.weight.flatten() for p in bert_of(sparse).encoder.modules() if isinstance(p, torch.nn.Linear)]
    )
    dense = torch.cat(
        [p.weight.flatten() for p in bert_of(student).encoder.modules() if isinstance(p, torch.nn.Linear)]
    )
    assert sparsity(sparse) == pytest.approx(0.6, abs=1e-4) and sparsity(student) == 0
    assert dense[weights == 0].abs().max() <= dense[weights != 0].abs().min()

    def train(model: SentenceTransformer) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            loss = outputs(model, TEXTS).square()[:, 0].sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    free = copy.deepcopy(sparse)
    with held(sparse, masks_of(sparse)):
        train(sparse)
    assert sparsity(sparse) == pytest.approx(0.6, abs=1e-4)
    train(free)
    assert sparsity(free) < 0.1, "the guard: training moves zeros that are not held"
    again = prune_magnitude(sparse, 0.5)
    assert sparsity(again) == pytest.approx(0.8, abs=1e-4), "of what is left"
    sparse.save_pretrained(str(tmp_path))
    assert sparsity(SentenceTransformer(str(tmp_path), device="cpu")) == pytest.approx(0.6, abs=1e-4)
    with pytest.raises(SettingsError, match="fraction 1"):
        prune_magnitude(student, 1)


@pytest.mark.parametrize("who", ["original", "pruned"])
def test_pruning_in_steps_trains_after_each_and_hands_on_the_teacher(student: SentenceTransformer, who: str) -> None:
    """Guards against steps that remove the whole fraction each, and a teacher that is the pruned student itself."""
    seen: list[tuple[int, Model]] = []
    trained: list[Model] = []

    def train(pruned: SentenceTransformer, teacher: Model) -> SentenceTransformer:
        seen.append((size_of(pruned).feed_forward, teacher))
        done = copy.deepcopy(pruned)
        with torch.no_grad():
            layers_of(bert_of(done))[0].output.dense.weight += 1e-3  # what is pruned must be zero again afterwards
        trained.append(done)
        return done

    settings = PruningSettings.model_validate({"neurons": 0.75, "weights": 0.4375, "steps": 2, "teacher": who})
    done = prune_iteratively(student, settings, train, texts=TEXTS)
    neurons = [bert_of(model).config.intermediate_size for model in trained]
    assert neurons == [32, 16] and done is trained[1]
    assert [teacher for _, teacher in seen] == ([student, student] if who == "original" else [student, trained[0]])
    zeros = float((layers_of(bert_of(done))[0].output.dense.weight == 0).float().mean())
    assert zeros > 0.1, "what was pruned is zero again"
    assert seen[1][0] < seen[0][0] < size_of(student).feed_forward


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_end_where_one_cut_does(student: SentenceTransformer, scope: str, steps: int) -> None:
    """Guards against counts that are rounded at each step: many small steps would remove no head, and too few neurons."""
    seen: list[Counts] = []

    def train(pruned: SentenceTransformer, teacher: Model) -> SentenceTransformer:
        seen.append(counts_of(pruned))
        return pruned

    settings = PruningSettings.model_validate({"heads": 0.25, "neurons": 0.3, "steps": steps, "scope": scope})
    prune_iteratively(student, settings, train, texts=TEXTS)
    for step, left in enumerate(seen, 1):
        for own, fraction, count in ((left.heads, 0.25, 4), (left.neurons, 0.3, 64)):
            part = (1 - fraction) ** (step / steps)
            assert sum(own) == (2 * round(count * part) if scope == "layer" else round(2 * count * part)), step


def test_a_release_refuses_what_devices_cannot_train(
    student: SentenceTransformer,
    tiny_release: Release,
    tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey,
    tmp_path: Path,
) -> None:
    """Guards against a release that is sealed, and fails on the first device that joins a round."""
    even = folded(prune_once(student, PruningSettings(neurons=0.5), TEXTS))
    assert type(even) is BertModel and even.config.intermediate_size == 32, "what any release takes"
    with pytest.raises(ReleaseError, match="ShapedBertModel"):
        publish_release(
            tmp_path / "odd",
            query_tower=folded(prune_once(student, PruningSettings(heads=0.5), TEXTS)),
            document_tower=tiny_release,
            tokenizer=tiny_tokenizer,
            spec=AdapterSpec(rank=2, layers=(0, 1), targets=("query", "value"), dim=32, seed=1),
            adapter=None,
            key=signing_key,
            parent=None,
            adapter_round=0,
            privacy_statement=None,
            query_tokens=16,
            document_tokens=48,
        )
    assert not (tmp_path / "odd").exists()


def test_pruning_without_what_it_needs_is_refused(student: SentenceTransformer) -> None:
    """Guards against pruning at random."""
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: importance(student, [], criterion="sensitivity"), "no texts"),
        (lambda: importance(student, TEXTS, criterion="taylor"), "measures against a teacher"),
        (lambda: importance(student, TEXTS, criterion="taylor", targets=np.zeros((1, 32), np.float32)), "1 targets"),
        (
            lambda: importance(student, TEXTS, criterion="taylor", targets=np.zeros((len(TEXTS), 16), np.float32)),
            "the student says 32 values",
        ),
    )
    for call, message in cases:
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ValidationError):
        PruningSettings(heads=1.0)
