"""What several tests of the distillery begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.server.distillery.learners import tower
from transformers import BertModel, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A tower of 32 values with its tokenizer."""
    found = tmp_path_factory.mktemp("tower")
    tiny_towers[0].save_pretrained(found)
    tiny_tokenizer.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A bi-encoder of two layers."""
    found = tmp_path_factory.mktemp("teacher")
    tiny_towers[1].save_pretrained(found / "tower")
    tiny_tokenizer.save_pretrained(found / "tower")
    tower(found / "tower").save_pretrained(str(found / "model"), create_model_card=False)
    return found / "model"
