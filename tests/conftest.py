"""What many tests need: a tiny tower with its tokenizer, a key, and a sealed release made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stillroom_shared.adapter import Adapter, AdapterSpec
from stillroom_shared.signing import SigningKey

if TYPE_CHECKING:  # imported inside the fixtures, so that tests without torch stay fast
    from transformers import BertModel, PreTrainedTokenizerFast

    from stillroom_shared.release import Release

TINY_SPEC = AdapterSpec(rank=2, layers=(0, 1), targets=("query", "value"), dim=32, seed=11)
TINY_WORDS = (
    "open close read write a an the zip tar file files list its members sort search index passage query tapir eats "
    "leaves river bank number array matrix of and or in to from with how do i what is returns true false when given"
)


@pytest.fixture(scope="session")
def signing_key() -> SigningKey:
    """The operator's key."""
    return SigningKey.generate()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-piece tokenizer: some words, every letter and digit as a start and as a continuation."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *".,?!_()'-:"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*words, *TINY_WORDS.split()]))}
    tokenizer: PreTrainedTokenizerFast = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_towers(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[BertModel, BertModel]:
    """(query tower, document tower): random, two layers of width 32; different weights."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    towers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tower = BertModel(config)
        tower.train(False)
        towers.append(tower)
    return towers[0], towers[1]


@pytest.fixture(scope="session")
def tiny_adapter() -> Adapter:
    """An adapter large enough to change vectors visibly."""
    values = np.random.default_rng(5).standard_normal(TINY_SPEC.size).astype(np.float32)
    return Adapter(TINY_SPEC, values * np.float32(0.5))


@pytest.fixture(scope="session")
def tiny_release(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey,
) -> Release:
    """A sealed release (32 dimensions, queries of 16 tokens, passages of 48), for reading only: copy it to alter it."""
    from stillroom_server.publish import publish_release

    query_tower, document_tower = tiny_towers
    folder: Path = tmp_path_factory.mktemp("releases") / "tiny"
    return publish_release(
        folder,
        query_tower=query_tower,
        document_tower=document_tower,
        tokenizer=tiny_tokenizer,
        spec=TINY_SPEC,
        adapter=None,
        key=signing_key,
        parent=None,
        adapter_round=0,
        privacy_statement=None,
        query_tokens=16,
        document_tokens=48,
    )


@pytest.fixture(scope="session")
def adapted_release(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_release: Release,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey,
) -> tuple[Release, Adapter]:
    """A child of `tiny_release` with a default adapter of an unusual spec, and the document tower taken over."""
    from stillroom_server.publish import publish_release

    spec = AdapterSpec(rank=3, layers=(1,), targets=("value", "query"), dim=32, seed=12)
    values = np.random.default_rng(6).standard_normal(spec.size).astype(np.float32)
    adapter = Adapter(spec, values * np.float32(0.5))
    folder: Path = tmp_path_factory.mktemp("releases") / "adapted"
    release = publish_release(
        folder,
        query_tower=tiny_towers[0],
        document_tower=tiny_release,
        tokenizer=tiny_tokenizer,
        spec=spec,
        adapter=adapter,
        key=signing_key,
        parent=tiny_release.id,
        adapter_round=15,
        privacy_statement={"epsilon": 1.57},
        query_tokens=16,
        document_tokens=48,
    )
    return release, adapter
