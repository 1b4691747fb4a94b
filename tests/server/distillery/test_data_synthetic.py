"""Queries made for passages: the same whatever the batch, kept piece by piece, clean; and sampled as they should be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY_WORDS
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from stillroom_server.distillery.data import synthetic
from stillroom_server.distillery.data.generation import Generator, clean, draw
from stillroom_server.distillery.data.heuristics import crop, sentences, summary, title
from stillroom_server.distillery.data.settings import SyntheticSettings
from stillroom_server.distillery.data.synthetic import QueryMaker, chosen_passages, made_queries, maker
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_shared.errors import SettingsError

PASSAGES = [
    "The tapir eats leaves from the river bank.",
    "Open a zip file and list its members.",
    "Sort an array of numbers and return the index of each.",
    "Search the index for a passage that answers the query and returns its number to the file.",
    "Write a file.",
]
ANY = SyntheticSettings(shortest=1, longest=64, new_tokens=8, per_passage=2, batch_size=3, passage_tokens=24)


@pytest.fixture(scope="module")
def generators(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A random model of each kind; what they write is nonsense."""
    torch.manual_seed(0)
    words = len(tiny_tokenizer)
    pad, end = tiny_tokenizer.pad_token_id, tiny_tokenizer.sep_token_id
    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=3.0,
                 pad_token_id=pad, eos_token_id=end)
    )  # fmt: skip
    causal = GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
                   bos_token_id=end, eos_token_id=end, pad_token_id=pad)
    )  # fmt: skip
    seq2seq.generation_config.decoder_start_token_id = pad
    seq2seq.train(False)
    causal.train(False)
    return {"seq2seq": (seq2seq, tiny_tokenizer), "llm": (causal, tiny_tokenizer)}


def lessons_of(folder: Path, passages: list[str]) -> Lessons:
    with LessonsWriter(folder, candidates=1) as writer:
        writer.texts(["a query before all"], "query", 0)
        writer.texts(passages, "passage", writer.source("zoo"))
    return Lessons.open(folder)


@pytest.mark.parametrize("kind", ["seq2seq", "llm"])
def test_a_query_belongs_to_its_passage_not_to_its_batch(
    generators: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], kind: str
) -> None:
    """Were chance the batch's, a resumed run would make other queries than one in a piece, and no figure could be repeated."""
    model, tokenizer = generators[kind]
    hot = ANY.model_copy(update={"temperature": 3.0})
    asked = Generator(model, tokenizer, hot, seed=0)
    written = {text: asked([text])[0] for text in PASSAGES}
    for size in (1, 4, 16):
        other = Generator(model, tokenizer, hot.model_copy(update={"batch_size": size}), seed=0)
        assert other(PASSAGES[::-1]) == [written[text] for text in PASSAGES[::-1]]
    assert len({query for queries in written.values() for query in queries}) > len(PASSAGES), (
        "nothing was drawn by chance"
    )
    again = Generator(model, tokenizer, hot, seed=1)
    assert again(PASSAGES) != list(written.values())
    assert again.identity != asked.identity


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """A sampler that is a little greedy makes dull queries, all alike, and looks right."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]))
    drawn = draw(logits.expand(20_000, -1), torch.from_numpy(np.random.default_rng(0).random(20_000)))
    shares = torch.bincount(drawn, minlength=5) / 20_000
    error = torch.sqrt(logits.exp() * (1 - logits.exp()) / 20_000)
    assert (abs(shares - logits.exp()) <= 4 * error).all() and shares[4] == 0
    flatter = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    assert (abs(shares - flatter)[:4] > 4 * error[:4]).any(), "the tolerance would accept another distribution"


def test_generation_follows_temperature_and_top_k(
    generators: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> None:
    """Settings that never reach the sampler are tuned in vain."""
    model, tokenizer = generators["seq2seq"]
    greedy = Generator(model, tokenizer, ANY.model_copy(update={"top_k": 1}), seed=0)
    assert all(one == two for one, two in greedy(PASSAGES))
    inputs = tokenizer(PASSAGES[:1], return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=inputs, do_sample=False, max_new_tokens=8)  # type: ignore[operator]
    assert greedy(PASSAGES[:1])[0][0] == " ".join(str(tokenizer.decode(expected[0], skip_special_tokens=True)).split())
    cold = Generator(model, tokenizer, ANY.model_copy(update={"temperature": 0.01}), seed=0)
    assert cold(PASSAGES[:1])[0][0] == greedy(PASSAGES[:1])[0][0]


def test_an_instructed_model_reads_the_prompt_in_its_template(
    generators: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> None:
    """A chat model asked without its template answers with anything but a question."""
    model, tokenizer = generators["llm"]
    settings = ANY.model_copy(update={"prompt": "Ask about: {passage}", "passage_tokens": 3})
    asked = Generator(model, tokenizer, settings, seed=0)
    assert asked.reads("the tapir eats leaves") == "Ask about: the tapir eats"
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<answer>"
    try:
        assert asked.reads("the tapir eats leaves") == "<user>Ask about: the tapir eats<answer>"
        assert len(asked(PASSAGES)) == len(PASSAGES)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("written", "query"),
    [
        ("what do tapirs eat at night", "what do tapirs eat at night"),
        ('"What do tapirs eat?"', "What do tapirs eat?"),
        ("Question: What do tapirs eat?", "What do tapirs eat?"),
        ("Sure:\n\n1. What do   tapirs eat?\n2. When do they sleep?", "What do tapirs eat?"),
        ("**Query 1:** `What do tapirs eat?`", "What do tapirs eat?"),
        ("- What do tapirs eat?", "What do tapirs eat?"),
        ("<think>A long\nthought about tapirs.</think>\nWhat do tapirs eat?", "What do tapirs eat?"),
        ("I think so</think>What do tapirs eat?", "What do tapirs eat?"),
        ("<think>What do tapirs eat? I wonder", ""),
        ("3 + 4 * (5 - 6) = 7", ""),
        ("Yes.", ""),
        ("word " * 40, ""),
        ("The tapir eats leaves.", ""),
        ("", ""),
        ("query expansion helps short queries", "query expansion helps short queries"),
    ],
)
def test_what_a_model_wrote_is_cleaned(written: str, query: str) -> None:
    """A label or a quotation mark before every query is learned as part of asking."""
    assert clean(written, "The tapir eats leaves.", SyntheticSettings()) == query


def test_queries_cut_out_of_passages() -> None:
    """A crop outside its passage or a sentence taken for a title teaches noise."""
    text = " ".join(f"w{number}" for number in range(40))
    spans = crop(text, 200, words=(3, 8), seed=0)
    assert all(span in text for span in spans) and spans == crop(text, 200, words=(3, 8), seed=0)
    assert Counter(len(span.split()) for span in spans).keys() == set(range(3, 9))
    assert {spans[0].split()[0]} != {span.split()[0] for span in spans}
    assert spans != crop(text, 200, words=(3, 8), seed=1)
    passage = "Tapirs of the river\nThe tapir eats leaves at night. It sleeps for most of the day."
    assert title(passage) == ["Tapirs of the river"] and summary(passage) == ["The tapir eats leaves at night."]
    assert set(sentences(passage, 9, seed=0)) >= {"It sleeps for most of the day."}
    assert len(sentences(passage, 1, seed=0)) == 1
    assert title("One line alone") == [] == summary("One sentence alone.")


def test_a_run_that_was_cut_off_makes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten hours of generation lost to a closed laptop; or, resumed, queries of another passage."""
    monkeypatch.setattr(synthetic, "PIECE", 4)
    lessons = lessons_of(tmp_path / "lessons", [f"the tapir number {n} eats leaves" for n in range(10)])
    rows, seen = lessons.rows("passage"), []
    short = ANY.model_copy(update={"shortest": 2, "longest": 4})
    heuristic = maker("crop", short, seed=0)

    def make(passages: object, *, limit: int) -> list[list[str]]:
        seen.append(passages)
        if len(seen) > limit:
            raise InterruptedError
        return heuristic.make(passages)  # type: ignore[arg-type]

    def run(limit: int, identity: str = "one") -> list[tuple[int, str]]:
        counting = QueryMaker(identity, lambda passages: make(passages, limit=limit))
        return list(made_queries(counting, lessons, rows, short, tmp_path / "kept"))

    with pytest.raises(InterruptedError):
        run(2)
    assert len(seen) == 3
    resumed = run(4)
    assert len(seen) == 4, "pieces that were there were made again"
    expected = [(int(row), query) for row in rows for query in dict.fromkeys(heuristic.make(lessons.texts([row]))[0])]
    assert resumed == expected and run(4) == expected and len(seen) == 4
    run(99, identity="another")
    assert len(seen) == 7, "another maker's pieces were taken for this one's"


def test_passages_are_chosen_by_content(tmp_path: Path) -> None:
    """A choice by row changes with every source that is put before."""
    lessons = lessons_of(tmp_path / "a", PASSAGES)
    turned = lessons_of(tmp_path / "b", PASSAGES[::-1])
    chosen = set(lessons.texts(chosen_passages(lessons, 2, seed=0)))
    assert len(chosen) == 2 and chosen == set(turned.texts(chosen_passages(turned, 2, seed=0)))
    assert len(chosen_passages(lessons, None, seed=0)) == len(PASSAGES)


def test_a_model_that_cannot_be_had_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """A stack of the library's own errors does not say which setting to change."""
    settings = SyntheticSettings(makers=("seq2seq",), model=str(tmp_path / "nowhere"))
    with pytest.raises(
        SettingsError, match=r"data.synthetic.model .*nowhere' cannot be loaded as AutoModelForSeq2SeqLM"
    ):
        maker("seq2seq", settings, seed=0)


def test_a_saved_generator_is_loaded_by_folder(
    generators: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], tmp_path: Path
) -> None:
    """The way from a setting to a query, through files."""
    model, tokenizer = generators["seq2seq"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = ANY.model_copy(update={"makers": ("seq2seq",), "model": str(tmp_path)})
    loaded = maker("seq2seq", settings, seed=0)
    assert loaded.make(PASSAGES) == Generator(model, tokenizer, settings, seed=0)(PASSAGES)
    assert set(" ".join(loaded.make(PASSAGES)[0]).split()) & {*TINY_WORDS.split(), *"abcdefghijklmnopqrstuvwxyz"}
