"""A corpus on disk, tiny models and a device that holds the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.simulations import shelves
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_client.device import Device
from stillroom_shared.release import Release


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelves.shelf(tmp_path_factory.mktemp("beir") / "zoo")


@pytest.fixture(scope="session")
def bi(
    tmp_path_factory: pytest.TempPathFactory, tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:  # fmt: skip
    return shelves.bi_encoder(tmp_path_factory.mktemp("bi"), tiny_towers[1], tiny_tokenizer)


@pytest.fixture(scope="session")
def cross(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return shelves.cross_encoder(tmp_path_factory.mktemp("cross") / "cross", tiny_tokenizer)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_release: Release, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("homes") / "device"
    with Device.create(folder, tiny_release, link=True) as device:
        device.add(shelves.corpus(data).passages)
    return folder
