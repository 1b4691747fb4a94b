"""Another release: documents are embedded anew while the old one serves, and everything switches at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.devices import ANIMALS, adapter_folder, passages, units
from tests.conftest import TINY_SPEC

import stillroom_client.upgrade as upgrade_module
from stillroom_client import derived, index_plan
from stillroom_client.device import Device
from stillroom_client.encoder import Encoder
from stillroom_client.store import TowerChangedError
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import Release, open_release
from stillroom_shared.signing import SigningKey

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{animal} {n}" for n in range(12) for animal in ANIMALS]  # 120 passages: two batches


@pytest.fixture(scope="session")
def releases(
    tmp_path_factory: pytest.TempPathFactory, tiny_towers: Any, tiny_tokenizer: Any, signing_key: SigningKey
) -> dict[str, Path]:
    """The same document tower with another query tower; towers exchanged; towers of width 16."""
    import torch
    from transformers import BertConfig, BertModel

    from stillroom_server.publish import publish_release

    query, document = tiny_towers
    torch.manual_seed(7)
    config = BertConfig(**query.config.to_dict() | {"hidden_size": 16, "intermediate_size": 32})
    narrow = BertModel(config)
    narrow.train(False)
    made = {}
    for name, towers in {"query": (document, document), "other": (document, query), "narrow": (narrow, narrow)}.items():
        spec = type(TINY_SPEC)(**vars_of(TINY_SPEC) | {"dim": towers[0].config.hidden_size})
        folder = tmp_path_factory.mktemp("releases") / name
        publish_release(
            folder, query_tower=towers[0], document_tower=towers[1], tokenizer=tiny_tokenizer, spec=spec, adapter=None,
            key=signing_key, parent=None, adapter_round=0, privacy_statement=None, query_tokens=16, document_tokens=48,
        )  # fmt: skip
        made[name] = folder
    return made


def vars_of(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ("rank", "layers", "targets", "dim", "seed")}


@pytest.fixture
def device(tmp_path: Path, tiny_release: Release) -> Iterator[Device]:
    with Device.create(tmp_path / "home", tiny_release) as device:
        device.add(passages(NAMES))
        device.refresh_index()
        yield device


def expected(folder: Path, query: str) -> list[float]:
    """The best scores of a device that had the release from the start: names may change places with near equals."""
    encoder = Encoder(open_release(folder, trusted_key=None))
    documents = encoder.encode_documents([p.full_text for p in passages(NAMES)])
    return np.sort(documents @ encoder.encode_queries([query])[0])[::-1][:5].tolist()  # type: ignore[no-any-return]


def found(device: Device, query: str) -> list[float]:
    return [hit.score for hit in device.search(query, 5, mode="dense")]


def near(some: list[float], others: list[float]) -> bool:
    return np.allclose(some, others, atol=0.01)


@pytest.mark.parametrize(("name", "embedded"), [("query", 0), ("other", 120), ("narrow", 120)])
def test_a_device_answers_as_if_it_had_the_release_from_the_start(
    device: Device, releases: dict[str, Path], name: str, embedded: int
) -> None:
    """Guards against a mixture of towers, a dimension that stays, and an index of the old vectors."""
    query = "the okapi is asleep"
    before, told = found(device, query), list[tuple[int, int]]()
    with Device.open(device.home) as other:
        assert found(other, query) == before
        done = device.upgrade(releases[name], report=lambda *state: told.append(state))
        assert (done.embedded, done.passages) == (embedded, embedded)
        assert not embedded or told[-1] == (120, 120)
        wanted = expected(releases[name], query)
        assert near(found(device, query), wanted) and before != wanted
        assert found(other, query) == found(device, query)  # without being opened again
    with Device.open(device.home) as again:
        assert found(again, query) == found(device, query)
        assert again.release.id == done.release and again.store.dimension == again.release.dimension
        assert again.store.query("SELECT count(*) FROM reembedded") == [(0,)]
        assert again.add(passages(["late"])).added == 1 and again.add(passages(NAMES)).unchanged == 120
        assert again.status().index == "stale" and len(found(again, query)) == 5
    assert device.upgrade(releases[name]).embedded == 0  # it is in use


def test_the_old_release_serves_until_the_switch(
    device: Device, releases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against searches and additions that wait for hours of embedding, and against what was added meanwhile."""
    query, embedding, go_on = "the okapi", threading.Event(), threading.Event()
    real = Encoder.encode_documents

    def slow(self: Encoder, texts: Any) -> Any:
        if threading.current_thread() is worker:
            embedding.set()
            assert go_on.wait(30)
        return real(self, texts)

    monkeypatch.setattr(Encoder, "encode_documents", slow)
    before = found(device, query)
    worker = threading.Thread(target=device.upgrade, args=(releases["other"],))
    worker.start()
    assert embedding.wait(30)
    assert found(device, query) == before
    device.add(passages(["meanwhile"], "The okapi {}."))
    device.remove([NAMES[3]])
    assert NAMES[3] not in {hit.passage_id for hit in device.search(query, 200, mode="dense")}
    go_on.set()
    worker.join(60)
    assert device.release.id == open_release(releases["other"], trusted_key=None).id
    assert {"meanwhile"} <= {hit.passage_id for hit in device.search(query, 200, mode="dense")}
    assert NAMES[3] not in {hit.passage_id for hit in device.search(query, 200, mode="dense")}


def test_two_upgrades_at_once_do_not_mix(
    device: Device, releases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against vectors of two new towers in one index, which no later check would find."""
    real, begun = Encoder.encode_documents, list[str]()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def overtaken(self: Encoder, texts: Any) -> Any:
        vectors = real(self, texts)
        if not begun:  # another process begins between the embedding of a batch and its commit
            begun.append("narrow")
            with Device.open(device.home) as other, suppress(KeyboardInterrupt):
                other.upgrade(releases["narrow"], report=interrupt)
        return vectors

    monkeypatch.setattr(Encoder, "encode_documents", overtaken)
    refused = ""
    try:
        device.upgrade(releases["other"], report=interrupt)
    except (KeyboardInterrupt, ReleaseError) as error:
        refused = str(error)
    device.upgrade(releases["narrow"])
    assert device.store.query("SELECT DISTINCT length(codes) FROM vectors") == [(16,)]
    assert near(found(device, "the okapi is asleep"), expected(releases["narrow"], "the okapi is asleep"))
    assert "another upgrade" in refused


def test_vectors_of_the_old_tower_are_refused_after_the_switch(device: Device, releases: dict[str, Path]) -> None:
    """Guards against passages that were embedded before the switch and stored after it: same dimension, no error, nonsense."""
    late = passages(["late"])
    embedded = device.embed(late)
    with Device.open(device.home) as other:
        other.upgrade(releases["other"])
    with pytest.raises(TowerChangedError):
        device.store.put(late, embedded.vectors, tower=embedded.tower)
    with pytest.raises(TowerChangedError):
        device.catalog.stage(late, embedded)
    with pytest.raises(ReleaseError, match="moved on"):
        device.candidates(units(1, 32), 5)
    with pytest.raises(ReleaseError, match="moved on"):
        device.vectors_of(NAMES[:2])
    assert device.add(late).added == 1  # embeds anew by itself
    assert device.candidates(units(1, 32), 5)[1].shape == (1, 5, 32)


def test_an_adapter_belongs_to_its_release(
    device: Device, releases: dict[str, Path], tmp_path: Path, signing_key: SigningKey
) -> None:
    """Guards against an adapter that is applied to other weights, or that stops the device."""
    device.adopt(adapter_folder(tmp_path / "old", device.release, signing_key))
    device.upgrade(releases["other"])
    assert device.adapter is None and found(device, "okapi")
    with pytest.raises(ReleaseError):
        device.adopt(tmp_path / "old")
    device.adopt(adapter_folder(tmp_path / "new", device.release, signing_key))
    with Device.open(device.home) as again:
        assert again.adapter is not None and again.adapter.release_id == again.release.id


def test_another_operators_release_is_refused(device: Device, releases: dict[str, Path], tmp_path: Path) -> None:
    """Guards against a release that anybody made, and against a home that is left half changed."""
    query = "okapi"
    before, files = found(device, query), sorted(path.name for path in device.home.iterdir())
    shutil.copytree(releases["other"], tmp_path / "forged")
    (tmp_path / "forged" / "tokenizer.json").write_text("{}")
    with pytest.raises(ReleaseError):
        device.upgrade(tmp_path / "forged")
    assert found(device, query) == before and sorted(path.name for path in device.home.iterdir()) == files


_KILLED = """
import os, signal, sys
from pathlib import Path
import stillroom_client.upgrade as upgrade
from stillroom_client.derived import Base
from stillroom_client.device import Device
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
after = int(sys.argv[3])
def counted(done, total):
    if done >= 64 and after == 0: kill()
if after == 1: upgrade._switch = kill
if after == 2: upgrade._forget = kill
if after == 3: Base.save = kill
if after == 4: upgrade._name = kill
if after == 5: upgrade.drop_replaced = kill
Device.open(Path(sys.argv[1])).upgrade(Path(sys.argv[2]), report=counted)
"""


@pytest.mark.parametrize("moment", range(6))
def test_sigkill_leaves_the_old_release_or_the_new_one(
    device: Device, releases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Guards against a home with vectors of one tower and a release with the other, and against embedding all again."""
    query = "the okapi is asleep"
    before = found(device, query)
    command = [sys.executable, "-c", _KILLED, str(device.home), str(releases["other"]), str(moment)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    switched = moment in (2, 5)
    wanted = expected(releases["other"], query)
    with Device.open(device.home) as again:
        assert near(found(again, query), wanted if switched else before)
        embedded = again.upgrade(releases["other"]).embedded
        assert embedded == 0 if switched else 0 < embedded <= 120 - 64
        assert near(found(again, query), wanted)
        again.compact()
        assert again.store.query("SELECT count(*) FROM reembedded") == [(0,)]
        assert near(found(again, query), wanted)
    assert found(device, query) and device.release.id == open_release(releases["other"], trusted_key=None).id


def test_a_large_index_is_ready_at_the_switch(
    device: Device, releases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a first search after the switch that builds a graph, or that reads the old one."""
    for module, name in ((derived, "FLAT_LIMIT"), (index_plan, "FLAT_LIMIT"), (index_plan, "LEARNT_LIMIT")):
        monkeypatch.setattr(module, name, 50)
    device.refresh_index()
    device.upgrade(releases["other"])
    monkeypatch.setattr(derived, "build", None)
    with Device.open(device.home) as again:
        in_use = again.index_in_use()
        assert (in_use["kind"], in_use["passages"]) == ("hnsw", 120) and int(in_use["beside"]) < 64
        assert near(found(again, "the okapi"), expected(releases["other"], "the okapi"))


def test_only_the_release_before_is_kept(device: Device, releases: dict[str, Path]) -> None:
    """Guards against a home that grows by a release each month, and against one that is pulled away from a reader."""
    for name in ("other", "narrow", "query"):
        device.upgrade(releases[name])
    kept = sorted(path.name for path in device.home.glob("release*"))
    assert len(kept) == 2 and device.store.in_use().folder in kept
    assert not os.path.exists(device.home / "release")
    assert upgrade_module._BATCH == 64
