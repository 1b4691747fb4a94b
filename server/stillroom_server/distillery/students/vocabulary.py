"""Trimming a vocabulary: the embeddings of tokens that a student's texts never use are most of its bytes.

Kept are the tokens of given public texts (as many of the most frequent as `size` allows), all special tokens, the alphabet
(single characters that the vocabulary has as a start and as a continuation), and tokens with a character that is not in that
alphabet. A word of other tokens is then split further instead of being lost (as for pruned multilingual vocabularies:
Abdaoui et al. 2020, arXiv 2010.05609).

Guarantees:

| text | afterwards |
|---|---|
| all its tokens were kept | the same rows go in: word pieces are the longest that match, and nothing longer appears |
| some were not, its characters are of the alphabet | made of shorter tokens; no [UNK] |
| a word has a character that is not of the alphabet | its tokens were kept, but a neighbour's may match further: may be [UNK] |
| a word was [UNK] before | stays so |

Token ids keep their order. Tokens that were added beside the word pieces, as markers of late interaction are, are kept as
special ones are: no word piece spells them. Only WordPiece tokenizers are read, which all BERT towers have.

A release has one tokenizer for both towers (`Manifest`): trim both alike, or serve the student elsewhere.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from stillroom_server.distillery.students.towers import AnyModel, Model, bert_of, first_of, with_tower
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import TOKENIZER_NAME


@dataclass(frozen=True, eq=False)
class Trimmed(Generic[AnyModel]):
    """A student with a smaller vocabulary.

    Attributes:
        student: a copy; the given one is not changed.
        kept: of each token of the new vocabulary, its old id, ascending.
        bytes_saved: of float32 embeddings, rows that no token named included.
        covered: fraction of the occurrences of tokens in the texts whose token was kept.
    """

    student: AnyModel
    kept: tuple[int, ...]
    bytes_saved: int
    covered: float


def trim_vocabulary(student: AnyModel, texts: Sequence[str], *, size: int | None = None) -> Trimmed[AnyModel]:
    """Drop the tokens that the texts do not use.

    Args:
        texts: public texts such as the student will read.
        size: most tokens to keep; None keeps all that occur.

    Raises:
        DataError: there are no texts.
        SettingsError: the tokenizer is no WordPiece one, or `size` is below what every vocabulary needs.
    """
    if not texts:
        raise DataError("no texts to trim the vocabulary to: give public texts such as the student will read")
    fields = _fields(student)
    counts = _counts(fields, texts)
    needed: set[int] = _needed(fields)
    if size is not None and size < len(needed):
        raise SettingsError(f"vocabulary size {size}: special tokens and the alphabet alone are {len(needed)}")
    room: int | None = None if size is None else size - len(needed)
    order = sorted(counts, key=lambda token: (-counts[token], token))
    often: list[int] = [token for token in order if token not in needed]
    kept = sorted({*needed, *often[:room]})
    smaller, (rows, dimension) = _sliced(student, kept, _renumbered(fields, kept))
    return Trimmed(
        student=smaller,
        kept=tuple(kept),
        bytes_saved=4 * dimension * (rows - len(kept)),
        covered=sum(counts[token] for token in kept) / max(1, counts.total()),
    )


def _fields(student: Model) -> dict[str, Any]:
    """What the tokenizer's JSON says."""
    tokenizer = student.tokenizer
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    fields: dict[str, Any] = json.loads(backend.to_str())
    if (kind := fields["model"]["type"]) != "WordPiece":
        raise SettingsError(f"the tokenizer is of type {kind}: only WordPiece vocabularies are trimmed")
    return fields


def _counts(fields: Mapping[str, Any], texts: Sequence[str]) -> Counter[int]:
    backend = Tokenizer.from_str(json.dumps(fields))
    backend.no_truncation()
    backend.no_padding()
    counts: Counter[int] = Counter()
    for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts


def _ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """The id of every token: of word pieces, and of what was added, most often a part of them."""
    return {**fields["model"]["vocab"], **{token["content"]: token["id"] for token in fields["added_tokens"]}}


def _needed(fields: Mapping[str, Any]) -> set[int]:
    """Ids of special and added tokens, of the alphabet, and of tokens that the alphabet cannot spell."""
    vocabulary: dict[str, int] = fields["model"]["vocab"]
    prefix: str = fields["model"]["continuing_subword_prefix"]
    starts = {token for token in vocabulary if len(token) == 1}
    alphabet = {token for token in starts if prefix + token in vocabulary}
    special = {token["content"] for token in fields["added_tokens"]} | {fields["model"]["unk_token"]}

    def spelled(token: str) -> bool:
        characters = token.removeprefix(prefix) if token.startswith(prefix) and token != prefix else token
        return len(characters) > 1 and set(characters) <= alphabet

    return {number for token, number in _ids(fields).items() if token in special or not spelled(token)}


def _renumbered(fields: Mapping[str, Any], kept: Collection[int]) -> dict[str, Any]:
    """The same tokenizer with the kept tokens only, wherever it names an id."""
    new = {old: number for number, old in enumerate(kept)}
    smaller: dict[str, Any] = copy.deepcopy(dict(fields))
    vocabulary = {token: new[number] for token, number in _ids(fields).items() if number in new}
    pieces = {token: vocabulary[token] for token, number in fields["model"]["vocab"].items() if number in new}
    smaller["model"]["vocab"] = dict(sorted(pieces.items(), key=lambda item: item[1]))
    for token in smaller["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    if padding := smaller.get("padding"):
        padding["pad_id"] = vocabulary[padding["pad_token"]]
    after = smaller.get("post_processor") or {}
    for token in (after.get("special_tokens") or {}).values():  # a template
        token["ids"] = [vocabulary[name] for name in token["tokens"]]
    for end in ("sep", "cls"):  # as BERT's own processor writes them: [token, id]
        if end in after:
            after[end] = [after[end][0], vocabulary[after[end][0]]]
    return smaller


def _sliced(student: AnyModel, kept: Sequence[int], fields: Mapping[str, Any]) -> tuple[AnyModel, torch.Size]:
    """A copy with the rows of the kept tokens and the new tokenizer, and the shape of the whole table."""
    rows = torch.tensor(kept)
    if isinstance(student, SentenceTransformer) and isinstance(student[0], StaticEmbedding):
        table = student[0].embedding.weight
        first = StaticEmbedding(Tokenizer.from_str(json.dumps(fields)), embedding_weights=_rows(table, rows))
        first.embedding.weight.requires_grad_(table.requires_grad)
        return copy.deepcopy(student, {id(student[0]): first}), table.shape
    tower = bert_of(student)
    smaller = with_tower(student, _with_rows(tower, rows))
    with tempfile.TemporaryDirectory() as folder:
        student.tokenizer.save_pretrained(folder)
        (Path(folder) / TOKENIZER_NAME).write_text(json.dumps(fields), encoding="utf-8")
        first_of(smaller).processor = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return smaller, tower.embeddings.word_embeddings.weight.shape


def _with_rows(tower: BertModel, rows: Tensor) -> BertModel:
    old = tower.embeddings.word_embeddings
    config = copy.deepcopy(tower.config)
    config.vocab_size = len(rows)
    if (pad := config.pad_token_id) is not None:
        config.pad_token_id = int((rows == pad).nonzero())
    table = nn.Embedding(len(rows), old.embedding_dim, config.pad_token_id, device="meta")
    table.weight = nn.Parameter(_rows(old.weight, rows), requires_grad=old.weight.requires_grad)
    return copy.deepcopy(tower, {id(old): table, id(tower.config): config})


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    return table.detach()[rows.to(table.device)].clone()
