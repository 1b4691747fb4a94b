"""The static tier: a table of token vectors and their mean, no transformer. For devices where even three layers cost too much.

As Model2Vec begins (van Dongen and Tulkens 2024, doi 10.5281/zenodo.17270888): a token's vector is the teacher's vector of
that token alone; the common mean is removed; tokens are weighted down by how usual they are, `a / (a + p)` with p the
token's share of all tokens (smooth inverse frequency, Arora et al. 2017). Without texts to count in, p follows Zipf's law
over the order of the vocabulary, which word-piece trainers sort by frequency. Model2Vec then keeps the leading principal
components as a space of its own; a query tower has to stay in the teacher's, so here the components are kept together with
the map back, a `Dense` without bias: with `rank` r, the table takes r / dim of its bytes.

The student is `[StaticEmbedding, (Dense,) Normalize]`, all of Sentence Transformers.

| case | what happens |
|---|---|
| [PAD], [UNK], [CLS], [SEP], [MASK] | zero rows, so that a mean over them changes no direction |
| a text of such tokens only, or of none | the zero vector |
| `rank` not below the teacher's dimension | the whole table and no `Dense` |
| `freeze_embeddings`, `freeze_layers` | the table learns whatever they say: there is nothing else that could |
| `dimension` below the teacher's | the leading components themselves: a space of the student's own |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor

from stillroom_server.distillery.students.settings import StudentSettings
from stillroom_server.distillery.students.towers import bert_of, evaluating, leading_directions, refuse_sizes

_SIF = 1e-3
"""The constant a of the weighting; Arora et al. find anything from 1e-4 to 1e-3 to do."""
_BATCH = 1_024
_SPECIAL = 2
"""[CLS] and [SEP], which a tower reads and a table does not."""


def make_static(
    settings: StudentSettings, teacher: SentenceTransformer, texts: Sequence[str] = ()
) -> SentenceTransformer:
    """A static student of the teacher.

    Args:
        texts: public texts in which tokens are counted; none for Zipf's law.

    Raises:
        SettingsError: the dimension is above the teacher's.
    """
    backend = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(settings.text_tokens - _SPECIAL)
    vectors = token_vectors(teacher)  # (vocabulary, dim)
    dim = vectors.shape[1]
    refuse_sizes(settings, width=dim, positions=0)
    dimension = settings.dimension or dim
    special = torch.tensor(teacher.tokenizer.all_special_ids)
    ordinary = torch.ones(len(vectors), dtype=torch.bool)
    ordinary[special] = False
    centred = vectors - vectors[ordinary].mean(0)
    share = token_shares(backend, ordinary, texts)
    table = centred * (_SIF / (_SIF + share))[:, None]
    modules: list[torch.nn.Module] = []
    kept = min(dimension, settings.rank or dim)
    if kept < dim:
        # A text's vector is a mean over its tokens: their shares weight what the variance of texts is made of.
        basis = leading_directions(table * share.sqrt()[:, None], kept)  # (dim, kept)
        table = table @ basis
        if dimension == dim:
            modules.append(_linear(basis))
    table[special] = 0.0
    embedding = StaticEmbedding(backend, embedding_weights=table.contiguous())
    student = SentenceTransformer(modules=[embedding, *modules, Normalize()], device="cpu")
    student.similarity_fn_name = "cosine"
    return student


@torch.inference_mode()
def token_vectors(teacher: SentenceTransformer) -> Tensor:
    """The teacher's vector of each token of its vocabulary, alone between [CLS] and [SEP], (vocabulary, dim)."""
    tokenizer, device = teacher.tokenizer, teacher.device
    count = bert_of(teacher).config.vocab_size
    rows = []
    for start in range(0, count, _BATCH):
        tokens = torch.arange(start, min(start + _BATCH, count))
        ends = [torch.full_like(tokens, end) for end in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
        ids = torch.stack([ends[0], tokens, ends[1]], 1).to(device)  # (batch, 3)
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        with evaluating(teacher):
            rows.append(teacher(features)["sentence_embedding"].float().cpu())
    return torch.cat(rows).clone()


def token_shares(tokenizer: Tokenizer, ordinary: Tensor, texts: Sequence[str] = ()) -> Tensor:
    """The share of each token in all tokens, (vocabulary,): counted, or by Zipf's law where there are no texts."""
    share = np.zeros(len(ordinary))
    if texts:
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
            np.add.at(share, encoding.ids, 1.0)
        share[~ordinary.numpy()] = 0.0
    else:
        share[ordinary.numpy()] = 1.0 / np.arange(1, int(ordinary.sum()) + 1)
    return torch.from_numpy(share / max(share.sum(), np.finfo(float).tiny)).float()


def _linear(basis: Tensor) -> Dense:
    """The map back from principal components, (kept) to (dim)."""
    dim, kept = basis.shape
    return Dense(kept, dim, bias=False, activation_function=torch.nn.Identity(), init_weight=basis.contiguous())
