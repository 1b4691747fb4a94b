"""Trimmed vocabularies: equal vectors for texts that are covered, other splits for the rest, and nothing lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer
from transformers import BertTokenizer

from stillroom_server.distillery.students.make import make_student
from stillroom_server.distillery.students.settings import Kind, StudentSettings
from stillroom_server.distillery.students.towers import bert_of, first_of
from stillroom_server.distillery.students.vocabulary import Trimmed, trim_vocabulary
from stillroom_server.publish import write_tokenizer
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Release

SEEN = ["Open the zip file.", "a tapir eats leaves", "open a river"]
UNSEEN = "sort the members of the tar passage"


@pytest.fixture(scope="module")
def model(tiny_release: Release) -> SentenceTransformer:
    """With the vocabulary turned round: special tokens come last, so trimming moves their ids."""
    model = SentenceTransformer(str(tiny_release.folder / "document"), device="cpu")
    words = sorted(model.tokenizer.vocab, key=lambda word: -model.tokenizer.vocab[word])
    turned = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, do_lower_case=True)
    turned.model_max_length = model.max_seq_length
    first_of(model).processor = turned
    bert_of(model).config.pad_token_id = turned.pad_token_id
    return model


@pytest.fixture(scope="module")
def trimmed(model: SentenceTransformer) -> Trimmed[SentenceTransformer]:
    return trim_vocabulary(model, SEEN)


def test_covered_texts_have_equal_vectors_and_others_are_split_further(
    model: SentenceTransformer, trimmed: Trimmed[SentenceTransformer]
) -> None:
    """Guards against rows of the wrong token, special tokens with an old id, and words that become [UNK]."""
    student = trimmed.student
    for text in SEEN:  # equal to the bit where kernels begin; how those sum may depend on where memory lies
        rows = [bert_of(one).embeddings(one.preprocess([text])["input_ids"]) for one in (student, model)]
        assert torch.equal(*rows), text
        np.testing.assert_allclose(student.encode(text), model.encode(text), atol=1e-6)
    old, new = model.tokenizer, student.tokenizer
    assert new.tokenize(UNSEEN) != old.tokenize(UNSEEN) and "[UNK]" not in new.tokenize(UNSEEN)
    assert "".join(new.tokenize(UNSEEN)).replace("##", "") == UNSEEN.replace(" ", "")
    assert new.tokenize("käse über") == old.tokenize("käse über"), "accents are stripped before"
    assert new.tokenize("漢") == ["[UNK]"] == old.tokenize("漢")
    assert [new.convert_ids_to_tokens(number) for number in range(len(new))] == [
        old.convert_ids_to_tokens(number) for number in trimmed.kept
    ]
    assert new.all_special_tokens == old.all_special_tokens


def test_what_is_saved_is_what_is_said(model: SentenceTransformer, trimmed: Trimmed[SentenceTransformer]) -> None:
    """Guards against a figure that is of the plan and not of the student."""
    tables = [bert_of(one).embeddings.word_embeddings.weight for one in (model, trimmed.student)]
    assert trimmed.bytes_saved == 4 * (tables[0].numel() - tables[1].numel()) > 0
    assert trimmed.covered == 1 and len(trimmed.kept) == len(tables[1]) == bert_of(trimmed.student).config.vocab_size
    assert torch.equal(tables[1], tables[0][list(trimmed.kept)])
    assert bert_of(model).config.vocab_size == len(tables[0]), "the given model is not changed"


def test_trimmed_students_save_load_and_serve(
    model: SentenceTransformer, trimmed: Trimmed[SentenceTransformer], tmp_path: Path
) -> None:
    """Guards against a folder whose tokenizer is still the old one, for Sentence Transformers and for the device."""
    trimmed.student.save_pretrained(str(tmp_path / "student"))
    loaded = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    texts = [*SEEN, UNSEEN]
    np.testing.assert_allclose(loaded.encode(texts), trimmed.student.encode(texts), atol=2e-6)
    assert loaded.max_seq_length == model.max_seq_length
    (tmp_path / "device").mkdir()
    device = write_tokenizer(tmp_path / "device", trimmed.student.tokenizer, 16)
    for text in texts:
        assert device.encode(text).ids == loaded.tokenizer.encode(text)
    pair = device.encode("open", "close")
    assert pair.tokens[0] == "[CLS]" and pair.tokens[-1] == "[SEP]" and pair.type_ids[-1] == 1


def test_a_bound_keeps_the_most_frequent(model: SentenceTransformer) -> None:
    """Guards against keeping the rarest, or the first."""
    whole = trim_vocabulary(model, [*["tapir"] * 3, *["river"] * 2, "zip"])
    small = trim_vocabulary(model, [*["tapir"] * 3, *["river"] * 2, "zip"], size=len(whole.kept) - 1)
    assert "zip" not in small.student.tokenizer.vocab and {"tapir", "river"} <= set(small.student.tokenizer.vocab)
    assert small.covered == pytest.approx(5 / 6) and len(small.kept) == len(whole.kept) - 1
    assert "[UNK]" not in small.student.tokenizer.tokenize("zip")


def test_tokens_that_the_alphabet_cannot_spell_are_kept(model: SentenceTransformer) -> None:
    """Guards against an alphabet with gaps: "!" has no continuation here, so only its own token can say it."""
    kept = trim_vocabulary(model, ["river"]).student.tokenizer
    assert kept.tokenize("(zip!)") == ["(", "z", "##i", "##p", "!", ")"]


def test_static_students_and_rerankers_are_trimmed_alike(model: SentenceTransformer, tmp_path: Path) -> None:
    """Guards against a table that keeps its rows, and a cross-encoder whose config still says the old size."""
    static = make_student(StudentSettings(kind="static", rank=8), model)
    assert isinstance(static, SentenceTransformer)
    smaller = trim_vocabulary(static, SEEN)
    backend = smaller.student.tokenizer
    assert isinstance(backend, Tokenizer)
    assert backend.encode("open").ids == [backend.token_to_id(token) for token in ("[CLS]", "open", "[SEP]")]
    assert backend.get_added_tokens_decoder().keys() == {
        backend.token_to_id(t) for t in model.tokenizer.all_special_tokens
    }
    np.testing.assert_allclose(smaller.student.encode(SEEN), static.encode(SEEN), atol=1e-6)
    assert first_of(smaller.student).embedding.weight.shape == (len(smaller.kept), 8)
    assert smaller.bytes_saved == 4 * 8 * (first_of(static).num_embeddings - len(smaller.kept))
    long = " ".join(["tapir"] * 29)
    one, two = np.asarray(smaller.student.encode([long + " tapir", long + " tapir a"]))
    np.testing.assert_allclose(one, two, atol=1e-6)
    scorer = make_student(StudentSettings(kind="reranker", layers=(0,), tokens=24), model)
    assert isinstance(scorer, CrossEncoder)
    small = trim_vocabulary(scorer, SEEN).student
    small.save_pretrained(str(tmp_path))
    loaded = CrossEncoder(str(tmp_path), device="cpu", local_files_only=True)
    pairs = [(SEEN[0], SEEN[1]), (SEEN[2], SEEN[1])]
    np.testing.assert_allclose(small.predict(pairs), scorer.predict(pairs), atol=1e-6)
    np.testing.assert_allclose(loaded.predict(pairs), scorer.predict(pairs), atol=1e-6)


@pytest.mark.parametrize("kind", ["tower", "late-interaction", "static"])
def test_tokens_that_were_added_stay(model: SentenceTransformer, tmp_path: Path, kind: Kind) -> None:
    """Guards against markers that are no word pieces: an unknown name, the row of another token, or none after loading."""
    marked = copy.deepcopy(model)
    before = len(marked.tokenizer)
    assert (
        marked.tokenizer.add_tokens(["zipfile.open"]) + marked.tokenizer.add_tokens(["[Q]"], special_tokens=True) == 2
    )
    bert_of(marked).resize_token_embeddings(before + 9)  # beyond the two, rows that no token names
    student: Any = make_student(StudentSettings(kind=kind, layers=(0, 1), token_dimension=8, passage_tokens=40), marked)
    smaller = trim_vocabulary(student, SEEN)
    assert smaller.kept[-2:] == (before, before + 1) and 0 < smaller.covered <= 1
    rows = [
        sum(x.numel() for name, x in one.named_parameters() if "embedding" in name)
        for one in (student, smaller.student)
    ]
    assert smaller.bytes_saved == 4 * (rows[0] - rows[1]) > 0
    smaller.student.save_pretrained(str(tmp_path))
    loaded = type(student)(str(tmp_path), device="cpu")
    for text in [*SEEN, "[Q] open a zipfile.open river"]:
        wanted = student.encode(text, convert_to_numpy=True)
        for one in (smaller.student, loaded):
            np.testing.assert_allclose(one.encode(text, convert_to_numpy=True), wanted, atol=2e-6)
    backend = loaded.tokenizer if kind == "static" else loaded.tokenizer.backend_tokenizer
    assert {"[Q]", "zipfile.open"} < set(backend.encode("[Q] zipfile.open").tokens), "the guard: they are read"


def test_trimming_without_what_it_needs_is_refused(model: SentenceTransformer) -> None:
    """Guards against a vocabulary of letters, by an empty list of texts."""
    with pytest.raises(DataError, match="no texts"):
        trim_vocabulary(model, [])
    with pytest.raises(SettingsError, match="vocabulary size 10"):
        trim_vocabulary(model, SEEN, size=10)
