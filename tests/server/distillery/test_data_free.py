"""Texts out of a vocabulary: as frequent, as long and as varied as said, and none of them a special token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY_WORDS
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from stillroom_server.distillery.data import datafree
from stillroom_server.distillery.data.datafree import Topics, Vocabulary, token_lists
from stillroom_server.distillery.data.gibbs import resampled
from stillroom_server.distillery.data.settings import DataFreeSettings
from stillroom_shared.errors import SettingsError

PLAIN = DataFreeSettings(method="unigram", query_words=6, spread=0.3)


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Words of the tiny tokenizer; their embeddings lie in two groups, so that topics are to be seen."""
    random = np.random.default_rng(0)
    embeddings = 0.1 * random.standard_normal((len(tiny_tokenizer), 16))
    embeddings[:, 0] += np.where(np.arange(len(tiny_tokenizer)) % 2, 1.0, -1.0)
    return Vocabulary.of(tiny_tokenizer, embeddings.astype(np.float32))


def test_texts_are_words_of_the_vocabulary(vocabulary: Vocabulary, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Special tokens, digits and unused entries are no text: a student of them learns about nothing."""
    assert set(tiny_tokenizer.convert_ids_to_tokens(vocabulary.ids.tolist())) == {
        w for w in TINY_WORDS.split() if len(w) > 1
    }
    for ids in token_lists(vocabulary, PLAIN, "query", 50, seed=0):
        text = tiny_tokenizer.decode(ids.tolist())
        assert tiny_tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_words_are_as_frequent_as_zipf_says(vocabulary: Vocabulary) -> None:
    """Uniform words would make rare ones the bulk of every text, which no real text is."""
    drawn = np.concatenate(list(token_lists(vocabulary, PLAIN, "query", 2_000, seed=0)))
    ranks = np.arange(1, len(vocabulary.ids) + 1)
    expected = (1 / ranks) / (1 / ranks).sum()
    counts = Counter(drawn.tolist())
    shares = np.array([counts[int(one)] for one in vocabulary.ids]) / len(drawn)
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (abs(shares - expected) < 5 * error).all()
    assert (abs(shares - ranks**-0.7 / (ranks**-0.7).sum()) > 5 * error).any(), "another exponent would be accepted"


def test_lengths_are_log_normal(vocabulary: Vocabulary) -> None:
    """Texts of one length teach a tower about one length."""
    lengths = np.array([len(ids) for ids in token_lists(vocabulary, PLAIN, "query", 2_000, seed=0)])
    assert np.median(lengths) == 6 and abs(np.log(lengths).std() - 0.3) < 0.03
    long = [len(ids) for ids in token_lists(vocabulary, PLAIN, "passage", 50, seed=0)]
    assert 60 < np.median(long) < 150


def test_topics_bring_words_together(vocabulary: Vocabulary) -> None:
    """Without a topic all vectors crowd around one mean, and the space between is never seen."""
    side = {int(one): int(one) % 2 for one in vocabulary.ids}

    def purity(settings: DataFreeSettings) -> float:
        texts = token_lists(vocabulary, settings, "passage", 200, seed=0)
        shares = [np.mean([side[one] for one in ids.tolist()]) for ids in texts]
        return float(np.mean(np.abs(np.array(shares) - 0.5)))

    flat = purity(PLAIN.model_copy(update={"exponent": 0.0}))
    focused = purity(DataFreeSettings(method="topics", exponent=0.0, focus=2.0))
    assert flat < 0.06 and focused > 0.2, (flat, focused)
    tilts = Topics.of(vocabulary).tilts(vocabulary, np.random.default_rng(0).standard_normal((4_000, 16)))
    assert abs(tilts.std() - 1) < 0.1


def test_a_text_follows_from_its_number_alone(vocabulary: Vocabulary) -> None:
    """More texts must extend the ones that were there, or every larger run is another experiment."""
    for method in ("unigram", "topics"):
        settings = DataFreeSettings(method=method)
        few, many = ([ids.tolist() for ids in token_lists(vocabulary, settings, "query", n, seed=0)] for n in (70, 130))
        assert many[:70] == few
        assert few != [ids.tolist() for ids in token_lists(vocabulary, settings, "query", 70, seed=1)]
        assert few[:5] != [
            ids.tolist()[: len(few[0])] for ids in token_lists(vocabulary, settings, "passage", 5, seed=0)
        ]


@pytest.fixture(scope="module")
def masked(tiny_tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=24, initializer_range=0.5)  # fmt: skip
    model = BertForMaskedLM(config)
    model.train(False)
    return model


def test_gibbs_draws_every_word_again_from_the_model(
    vocabulary: Vocabulary, masked: BertForMaskedLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Positions that are never drawn again keep the words of no language; padding must not be drawn at all."""
    texts = list(token_lists(vocabulary, PLAIN, "query", 9, seed=0))
    settings = PLAIN.model_copy(update={"sweeps": 1, "batch_size": 4, "temperature": 1e-4})
    found = list(resampled(masked, tiny_tokenizer, vocabulary, texts, settings, seed=0))
    assert [len(one) for one in found] == [len(one) for one in texts]
    allowed = set(vocabulary.ids.tolist())
    assert all(set(one.tolist()) <= allowed for one in found)
    # Cold, each word is the model's best at the moment it was drawn: the last one drawn still is.
    alone = list(
        resampled(masked, tiny_tokenizer, vocabulary, texts, settings.model_copy(update={"batch_size": 1}), seed=0)
    )
    assert [one.tolist() for one in alone] == [one.tolist() for one in found], "chance belongs to the batch"
    best, mask = 0, tiny_tokenizer.mask_token_id
    for one in found:
        still = []
        for place in range(len(one)):
            ids = [tiny_tokenizer.cls_token_id, *one.tolist(), tiny_tokenizer.sep_token_id]
            ids[place + 1] = mask
            with torch.no_grad():
                logits = masked(input_ids=torch.tensor([ids])).logits[0, place + 1][vocabulary.ids]
            still.append(int(vocabulary.ids[int(logits.argmax())]) == one[place])
        best += any(still)
    assert best == len(found)
    shown = list(resampled(masked, tiny_tokenizer, vocabulary, [np.repeat(vocabulary.ids, 2)], settings, seed=0))
    assert len(shown[0]) == 22, "longer than the model's positions: cut, not crashed"


def test_a_model_without_a_head_is_refused_for_gibbs(
    tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The library fills a missing head with random numbers and a warning: fluent nonsense, distilled for hours."""
    tiny_towers[0].save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = DataFreeSettings(method="gibbs", model=str(tmp_path), queries=2)
    with pytest.raises(SettingsError, match=r"has no masked-token head .*choose method topics or unigram"):
        list(datafree.texts(settings, "query", seed=0))
    topical = settings.model_copy(update={"method": "topics"})
    assert len(list(datafree.texts(topical, "query", seed=0))) == 2
    with pytest.raises(SettingsError, match=r"data\.datafree\.model 'nowhere-at-all' cannot be loaded"):
        list(datafree.texts(settings.model_copy(update={"model": "nowhere-at-all"}), "query", seed=0))
