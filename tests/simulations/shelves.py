"""A tiny corpus on disk, tiny models of each kind, and what they should find, worked out the slow way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.references import ndcg as reference

from stillroom_client.encoder import Encoder
from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import Corpus
from stillroom_simulations.evaluating import sentence_models
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.run import Choices, evaluate_models
from stillroom_simulations.evaluating.values import Evaluation
from stillroom_simulations.evaluating.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from stillroom_shared.release import Release

PASSAGES = {
    "d01": ("open", "open a zip file and read the list of its members"),
    "d02": ("", "close the tar file"),
    "d03": ("sort", "sort the members of an array"),
    "d04": ("", "the tapir eats leaves"),
    "d05": ("river", "the bank of the river"),
    "d06": ("", "search an index with a query"),
    "d07": ("", "a passage is true when given, false when not"),
    "d08": ("write", "write a file to a zip"),
    "d09": ("", "matrix and number"),
    "d10": ("", "what is the index of a number in an array"),
    "d11": ("", "the tapir eats leaves"),
    "d12": ("", "returns the query"),
}
QUERIES = {
    "q1": "how do i read the members of a zip",
    "q2": "what eats leaves",
    "q3": "sort an array",
    "q4": "river bank",
    "q5": "search with a query",
    "q6": "is it true or false",
    "q7": "write to a file",
}
QRELS = {
    "test": {"q1": {"d01": 2, "d08": 1}, "q2": {"d04": 1, "d11": 1}, "q3": {"d03": 1}, "q4": {"d05": 1, "d09": 0}},
    "dev": {"q5": {"d06": 2, "d12": 1}, "q6": {"d07": 1}},
    "train": {"q7": {"d08": 1}},
}
Ranker = Callable[[str], list[str]]


def shelf(folder: Path, *, splits: Sequence[str] = ("test", "dev", "train")) -> Path:
    """The corpus in BEIR layout."""
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (
        ("corpus", [{"_id": key, "title": title, "text": text} for key, (title, text) in PASSAGES.items()]),
        ("queries", [{"_id": key, "text": text} for key, text in QUERIES.items()]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split in splits:
        rows = [
            f"{query}\t{passage}\t{grade}\n" for query, own in QRELS[split].items() for passage, grade in own.items()
        ]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def corpus(folder: Path) -> Corpus:
    """What `shelf` wrote, read."""
    return load_beir(folder, splits="as-published")


def full_texts() -> dict[str, str]:
    """Title and text as they are joined, by passage."""
    return {key: f"{title}\n{text}" if title else text for key, (title, text) in PASSAGES.items()}


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Best first, the smaller id first among equals."""
    return sorted(scores, key=lambda key: (-round(scores[key], 6), key))


def dense(query: Callable[[str], Any], passage: Callable[[str], Any]) -> Ranker:
    """Cosine, one pair at a time, in float64."""
    held = {key: np.asarray(passage(text), np.float64).ravel() for key, text in full_texts().items()}

    def ranker(text: str) -> list[str]:
        asked = np.asarray(query(text), np.float64).ravel()
        return ranked({k: float(asked @ v / np.linalg.norm(asked) / np.linalg.norm(v)) for k, v in held.items()})

    return ranker


def released(release: Release, precision: Any) -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """Query and document tower of a release."""
    encoder = Encoder(release, precision=precision)
    return lambda text: encoder.encode_queries([text]), lambda text: encoder.encode_documents([text])


def bi_encoder(folder: Path, tower: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    """A bi-encoder with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tower.save_pretrained(folder / "tower")
    tokenizer.save_pretrained(folder / "tower")
    parts = [Transformer(str(folder / "tower"), max_seq_length=48), Pooling(32, "mean")]
    SentenceTransformer(modules=parts, device="cpu", **options).save(str(folder / "model"))
    return folder / "model"


def static_table(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Static embeddings: a table and a mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.random.default_rng(4).standard_normal((len(tokenizer), 16)).astype(np.float32)
    table = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[table], device="cpu").save(str(folder))
    return folder


def multi_vector(folder: Path, tower: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Late interaction, random."""
    import torch
    from sentence_transformers import MultiVectorEncoder

    tower.save_pretrained(folder / "tower")
    tokenizer.save_pretrained(folder / "tower")
    torch.manual_seed(3)
    MultiVectorEncoder(str(folder / "tower"), device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def cross_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast, *, labels: int = 1) -> Path:
    """A cross-encoder, random, whose logits are far apart."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    config.num_labels = labels
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(found: Evaluation, model: str, rankings: Ranker, split: str = "test") -> None:
    """Every metric of every query is that of a slow ranking."""
    scores = found.sets[0].of(model).scores
    assert set(scores.query_ids) == set(QRELS[split])
    for row, query in enumerate(scores.query_ids):
        order, grades = rankings(QUERIES[query]), QRELS[split][query]
        wanted = [
            reference.ndcg(order, grades), reference.recall(order, grades), reference.recall(order, grades, 100),
            reference.reciprocal_rank(order, grades), reference.average_precision(order, grades),
        ]  # fmt: skip
        assert scores.table[row] == pytest.approx(wanted, abs=1e-9), (model, query)


def evaluate(models: list[Any], data: Path, **choices: Any) -> Evaluation:
    """Quickly, without timing."""
    made = Choices(**{"timed": 0, "resamples": 50, **choices})
    return evaluate_models(models, [corpus(data)], made)


def slow_first(data: Path, bi: Path | None) -> Ranker:
    """BM25 as the index of words has it, or a bi-encoder."""
    if bi is not None:
        model: Any = sentence_models.load_model(str(bi)).model
        return dense(model.encode, model.encode)
    passages = corpus(data).passages
    searcher = Words().index(passages, Kept(None))

    def ranker(text: str) -> list[str]:
        scores, rows = searcher.found.search(text, 100)
        return ranked(dict(zip([passages[row].id for row in rows], scores.tolist(), strict=True)))

    return ranker
