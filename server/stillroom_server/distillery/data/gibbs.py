"""Texts made fluent by a masked-token model: each token in turn is masked and drawn again from what the model expects there.

A sequential Gibbs-like sampler after Wang & Cho 2019 (arXiv 1902.04094): BERT's conditionals belong to no joint
distribution, so nothing converges to anything; a few sweeps make neighbours fit. One pass of the model for each position and
sweep, for a whole batch of texts. Only tokens of the vocabulary that texts are made of are drawn; chance belongs to the text,
not to the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stillroom_server.distillery.data.datafree import Vocabulary
from stillroom_server.distillery.data.generation import draw
from stillroom_server.distillery.data.settings import DataFreeSettings
from stillroom_shared.errors import SettingsError


@torch.no_grad()
def resampled(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    texts: Iterable[NDArray[np.int64]],
    settings: DataFreeSettings,
    *,
    seed: int,
) -> Iterator[NDArray[np.int64]]:
    """The texts with every token drawn again `sweeps` times, in the order given.

    Args:
        model: gives logits for token ids, (batch, tokens, vocabulary).
        texts: token ids without special ones.
    """
    if tokenizer.mask_token_id is None or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise SettingsError(
            "data.datafree.model has no mask, start or end token: gibbs needs them, choose another method"
        )
    allowed = torch.full((model.config.vocab_size,), -torch.inf)
    allowed[torch.from_numpy(vocabulary.ids)] = 0.0
    room = int(model.config.max_position_embeddings) - 2
    waiting, number = iter(texts), 0
    while batch := list(islice(waiting, settings.batch_size)):
        rows = [text[:room] for text in batch]
        randoms = [np.random.default_rng([seed, 2, number + row]) for row in range(len(rows))]
        ids, mask = _padded(rows, tokenizer)
        for _ in range(settings.sweeps):
            # Each text in an order of its own, so that no position is always the last to be drawn.
            orders = [random.permutation(len(row)) for random, row in zip(randoms, rows, strict=True)]
            for step in range(max(map(len, rows))):
                _step(model, tokenizer, ids, mask, [order[step] if step < len(order) else -1 for order in orders],
                      torch.tensor([random.random() for random in randoms]), allowed, settings.temperature)  # fmt: skip
        number += len(rows)
        yield from (row[1 : 1 + len(text)].numpy() for row, text in zip(ids, rows, strict=True))


def _step(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    places: list[int],
    uniforms: Tensor,
    allowed: Tensor,
    temperature: float,
) -> None:
    """Draw one token of each text again, in place; -1 leaves a text as it is."""
    active = torch.tensor([place >= 0 for place in places])
    rows, columns = torch.nonzero(active).squeeze(1), torch.tensor([place + 1 for place in places])[active]
    ids[rows, columns] = tokenizer.mask_token_id
    logits = model(input_ids=ids, attention_mask=mask).logits[rows, columns].float()
    ids[rows, columns] = draw(logits / temperature + allowed, uniforms[active])


def _padded(rows: list[NDArray[np.int64]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids between start and end tokens, and 1 where a token is: both (texts, longest + 2)."""
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id or 0))
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        whole = [tokenizer.cls_token_id, *row.tolist(), tokenizer.sep_token_id]
        ids[number, : len(whole)] = torch.tensor(whole)
        mask[number, : len(whole)] = 1
    return ids, mask
