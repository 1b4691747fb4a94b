"""Every kind of model against a ranking worked out the slow way, and what is kept of them."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from tests.references.blending import reranked
from tests.simulations import shelves
from tests.simulations.shelves import PASSAGES, Ranker, check, evaluate, slow_first
from torch import nn
from transformers import BertModel, PreTrainedTokenizerFast

from stillroom_client.device import Device
from stillroom_client.ranking import Mode
from stillroom_client.rerank import USUAL
from stillroom_server.distillery.rotation import Rotation, rotated_model
from stillroom_server.rerankers import with_reranker
from stillroom_shared.corpus import Passage, Query
from stillroom_shared.errors import SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey
from stillroom_simulations.evaluating import sentence_models
from stillroom_simulations.evaluating.homes import MODES, Home
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.rerankers import Reranking
from stillroom_simulations.evaluating.systems import silent


def test_bi_encoders_and_static_tables_equal_a_slow_ranking(
    data: Path, bi: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A query embedded as a passage, a title that is dropped or padding that leaks gives figures that look fine."""
    table = shelves.static_table(tmp_path / "table", tiny_tokenizer)
    found = evaluate([str(bi), f"{bi}@8", str(table)], data)
    for name, folder in (("model", bi), ("table", table)):
        model: Any = sentence_models.load_model(str(folder)).model
        check(found, name, shelves.dense(model.encode, model.encode))
    model = sentence_models.load_model(str(bi)).model
    cut = shelves.dense(lambda text: model.encode(text)[:8], lambda text: model.encode(text)[:8])
    check(found, "model@8", cut)
    assert found.sets[0].of("model@8").bytes.each_passage == 32
    assert found.sets[0].of("table").bytes.query_model == 16 * 4 * len(tiny_tokenizer)


def test_a_turned_space_costs_no_second_reading_of_the_passages(
    data: Path, bi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of embedding again for each rotation of one teacher; or its vectors taken for those of the rotation."""
    model: Any = sentence_models.load_model(str(bi)).model
    model.append(Normalize())
    model.tokenizer.backend_tokenizer.enable_truncation(7)  # what it was last told, which its file remembers
    model.save(str(tmp_path / "plain"))
    model.tokenizer.backend_tokenizer.no_truncation()
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((32, 32)))[0]
    rotated_model(model, Rotation(basis, np.ones(32))).save(str(tmp_path / "turned"))
    evaluate([str(tmp_path / "plain")], data, cache=tmp_path / "cache")
    read: list[str] = []
    encode = SentenceTransformer.encode_document

    def noted(self: SentenceTransformer, texts: list[str], **more: Any) -> Any:
        read.extend(texts)
        return encode(self, texts, **more)

    monkeypatch.setattr(SentenceTransformer, "encode_document", noted)
    names = [str(tmp_path / "turned"), f"{tmp_path / 'turned'}@8"]
    found = evaluate(names, data, cache=tmp_path / "cache")
    assert not read
    turned: Any = sentence_models.load_model(names[0]).model
    check(found, "turned", shelves.dense(turned.encode, turned.encode))
    cut = shelves.dense(lambda text: turned.encode(text)[:8], lambda text: turned.encode(text)[:8])
    check(found, "turned@8", cut)


def test_prompts_and_other_similarities_are_the_models_own(
    data: Path, tmp_path: Path, tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Without its prompts, or with dot products made cosines, a model is measured as another one."""
    prompts = {"query": "search the index with ", "document": "given a passage "}
    for name in ("dot", "euclidean"):
        folder = shelves.bi_encoder(
            tmp_path / name, tiny_towers[1], tiny_tokenizer, prompts=prompts, similarity_fn_name=name
        )
        found = evaluate([str(folder)], data)
        model: Any = sentence_models.load_model(str(folder)).model

        def slow(text: str, model: Any = model) -> list[str]:
            asked = model.encode([prompts["query"] + text], prompt="")
            held = model.encode([prompts["document"] + own for own in shelves.full_texts().values()], prompt="")
            values = model.similarity(asked, held)[0].tolist()
            return shelves.ranked(dict(zip(PASSAGES, values, strict=True)))

        check(found, "model", slow)


def test_releases_pairs_and_homes_equal_a_slow_ranking(data: Path, bi: Path, home: Path, tiny_release: Release) -> None:
    """The wrong tower or precision on either side is off by a little: nobody would see it in a table."""
    folder = str(tiny_release.folder)
    models = [folder, f"{folder}@float32", f"{folder}@float32::{bi}", f"{bi}::{folder}", str(home)]
    found = evaluate(models, data)
    model: Any = sentence_models.load_model(str(bi)).model
    small, full = (shelves.released(tiny_release, precision) for precision in ("int8", "float32"))
    check(found, "tiny", shelves.dense(*small))
    check(found, "tiny@float32", shelves.dense(*full))
    check(found, "tiny@float32::model", shelves.dense(full[0], model.encode))
    check(found, "model::tiny", shelves.dense(model.encode, small[1]))
    with Device.open(home) as device:
        for mode in ("dense", "bm25", "hybrid"):

            def served(text: str, mode: Any = mode) -> list[str]:
                return [hit.passage_id for hit in device.search(text, 12, mode=mode, cached=False)]

            check(found, f"device@{mode}", served)
    sizes = found.sets[0].of("tiny").bytes
    assert sizes.query_model == tiny_release.query_onnx("int8").stat().st_size
    assert sizes.passage_model == tiny_release.document_onnx("int8").stat().st_size
    names = [
        "tiny",
        "tiny@float32",
        "tiny@float32::model",
        "model::tiny",
        "device@dense",
        "device@bm25",
        "device@hybrid",
    ]
    assert [one.model for one in found.sets[0].models] == names


@pytest.mark.parametrize("top", [12, 120])
def test_a_reranker_behind_a_device_is_told_its_scores_however_it_asks(
    tmp_path: Path, tiny_release: Release, cross: Path, signing_key: SigningKey, top: int
) -> None:
    """Beyond what people look at, a place in a list taken for a score: one ranking is measured, and another is timed."""
    model: Any = sentence_models.load_model(str(cross)).model
    release = with_reranker(tmp_path / "release", tiny_release, model, key=signing_key, tokens=48)[0]
    words = sorted({word for text in shelves.full_texts().values() for word in text.split()})
    drawn = np.random.default_rng(0).choice(words, (130, 6))
    passages = [Passage(f"p{row:03}", "zoo", " ".join(["zip", *own]), "") for row, own in enumerate(drawn)]
    asked = {"a": "search the members of a zip", "b": "write a number to the zip file"}
    queries = [Query(key, "zoo", text, "test") for key, text in asked.items()]

    def logits(query: str, texts: Sequence[str]) -> NDArray[np.floating]:
        return np.array([zlib.crc32(f"{query} {text}".encode()) % 1000 for text in texts], float)

    with Device.create(tmp_path / "device", release, link=True) as device:
        device.add(passages)
        for mode in MODES:
            behind = Reranking("own", "", logits, "own", 0, Home("device", device, mode), top)
            searcher = behind.index(passages, Kept(None))
            for query in queries:
                rerank, own = (USUAL, "hybrid") if mode == "rerank" else (0, mode)
                hits = device.search(query.text, top, mode=cast(Mode, own), rerank=rerank, cached=False)
                ran = sorted(searcher.first.run([query], 130, silent)[query.id].items(), key=lambda one: -one[1])
                for ranking in (searcher.first.search(searcher.first.encode(query.text), top), ran[:top]):
                    assert [passage for passage, _ in ranking] == [hit.passage_id for hit in hits]
                    assert [score for _, score in ranking] == pytest.approx([hit.score for hit in hits], abs=1e-6)
                timed = searcher.search(searcher.encode(query.text), top)
                assert list(searcher.run([query], 130)[query.id])[:top] == [passage for passage, _ in timed]
                assert len(ran) == 130


def test_cross_encoders_read_the_top_of_their_first_stage(data: Path, bi: Path, cross: Path) -> None:
    """A reranker that reads all passages, or loses those it did not read, has another recall than its first stage."""
    for first, label in (("bm25", "bm25"), (str(bi), "model")):
        found = evaluate([first, str(cross)], data, first_stage=first, rerank=3, first_share=0)
        assert found.sets[0].of("cross").how == f"torch float32, reads the best 3 of {label}"
        model: Any = sentence_models.load_model(str(cross)).model
        [system] = [one for one in found.sets[0].models if one.model == label]
        base = slow_first(data, bi if first != "bm25" else None)

        def slow(text: str, base: Ranker = base, model: Any = model) -> list[str]:
            order = base(text)
            scores = {key: float(model.predict([(text, shelves.full_texts()[key])])[0]) for key in order[:3]}
            return [*shelves.ranked(scores), *order[3:]]

        check(found, label, base)
        check(found, "cross", slow)
        assert (
            found.sets[0].of("cross").scores.of("recall_at_100").tolist() == system.scores.of("recall_at_100").tolist()
        )
        assert (found.sets[0].of("cross").scores.table != system.scores.table).any(), (
            "the guard: something was re-ranked"
        )


def test_a_pair_may_be_the_first_stage(data: Path, bi: Path, cross: Path, tiny_release: Release) -> None:
    """The towers of a pair taken for one model of an odd name; or another first stage than the one that was named."""
    pair = f"{tiny_release.folder}@float32::{bi}"
    found = evaluate([pair, str(cross)], data, first_stage=pair, rerank=3, first_share=1)
    model: Any = sentence_models.load_model(str(bi)).model
    base = shelves.dense(shelves.released(tiny_release, "float32")[0], model.encode)
    check(found, "cross", base)
    assert "reads the best 3 of tiny@float32::model," in found.sets[0].of("cross").how
    with pytest.raises(SettingsError, match="is a CrossEncoder: a pair is of two bi-encoders"):
        evaluate([str(cross)], data, first_stage=f"{cross}::{bi}")


def test_a_cross_encoder_ranks_together_with_its_first_stage(data: Path, bi: Path, cross: Path) -> None:
    """Scores of two scales in one sum are a ranking by the louder; a device's ranking is what is measured unless told."""
    found = evaluate([str(bi), str(cross)], data, first_stage=str(bi), rerank=4)
    scorer: Any = sentence_models.load_model(str(cross)).model
    model: Any = sentence_models.load_model(str(bi)).model
    texts, base = shelves.full_texts(), slow_first(data, bi)

    def slow(text: str, share: float = 0.5) -> list[str]:
        order = base(text)
        top = order[:4]
        asked, read = model.encode(text, normalize_embeddings=True), model.encode([texts[key] for key in top])
        cosines = [float(asked @ own / np.linalg.norm(own)) for own in read]
        logits = scorer.predict([(text, texts[key]) for key in top], activation_fn=nn.Identity()).tolist()
        return [*(top[place] for place in reranked(cosines, logits, share)), *order[4:]]

    check(found, "cross", slow)
    assert found.sets[0].of("cross").how == "torch float32, reads the best 4 of model, whose scores have a share of 0.5"
    alone = evaluate([str(bi), str(cross)], data, first_stage=str(bi), rerank=4, first_share=0)
    first = evaluate([str(bi), str(cross)], data, first_stage=str(bi), rerank=4, first_share=1)
    check(first, "cross", base)
    check(alone, "cross", lambda text: slow(text, 0))
    assert any(slow(text) not in (slow(text, 0), slow(text, 1)) for text in shelves.QUERIES.values()), "the guard"
    with pytest.raises(SettingsError, match=r"first_share = 1.5 is out of range: give 0 to 1"):
        evaluate([str(cross)], data, first_share=1.5)


def test_late_interaction_is_exact_maxsim(
    data: Path, tmp_path: Path, tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Padding that takes part, a block's edge that cuts a passage, or a sum over the wrong side still ranks somehow."""
    from stillroom_simulations.evaluating import late

    monkeypatch.setattr(late, "_BLOCK", 17)  # passages of several blocks
    folder = shelves.multi_vector(tmp_path, tiny_towers[1], tiny_tokenizer)
    found = evaluate([str(folder)], data)
    model: Any = sentence_models.load_model(str(folder)).model
    held = {key: model.encode_document([text])[0] for key, text in shelves.full_texts().items()}

    def slow(text: str) -> list[str]:
        asked = model.encode_query([text])[0]
        return shelves.ranked({key: float(model.similarity([asked], [one])[0, 0]) for key, one in held.items()})

    check(found, "model", slow)
    tokens = sum(len(one) for one in held.values())
    assert found.sets[0].of("model").bytes.each_passage == tokens * 128 * 4 / len(PASSAGES)


def test_what_was_embedded_is_kept_by_content(data: Path, bi: Path, tmp_path: Path) -> None:
    """A stale vector is the wrong model's, silently; a lost one costs an hour again."""
    calls: list[int] = []
    tower = sentence_models.sentence_tower(sentence_models.load_model(str(bi)), "passage")
    texts = list(shelves.full_texts().values())

    def counted(items: Any) -> list[Any]:
        calls.append(len(items))
        return [row[None] for row in tower.embed(items)]

    store = Kept(tmp_path)
    first = store.arrays(tower.identity, texts, counted, shard=5)
    assert calls == [5, 5, 2]
    again = store.arrays(tower.identity, texts, counted, shard=5)
    assert calls == [5, 5, 2] and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    store.arrays(tower.identity, [*texts[:5], "changed", *texts[6:]], counted, shard=5)
    store.arrays(f"another {tower.identity}", texts[:5], counted, shard=5)
    assert calls == [5, 5, 2, 5, 5]
    for number, path in enumerate(tmp_path.glob("*.npz")):
        path.write_bytes(path.read_bytes()[: 50 * (number % 2)])
    mended = store.arrays(tower.identity, texts, counted, shard=5)
    assert calls[5:] == [5, 5, 2] and all(np.array_equal(a, b) for a, b in zip(first, mended, strict=True))


def test_an_identity_knows_all_that_changes_a_vector(
    bi: Path, tmp_path: Path, tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Weights alone do not make a model: pooling, limits, prompts and activation change vectors, and must change the key."""
    changes: list[tuple[str, Callable[[Path], None]]] = []

    def edit(name: str, key: str, value: Any) -> None:
        def change(folder: Path) -> None:
            [path] = [own for own in folder.rglob(name) if f'"{key}"' in own.read_text()]
            path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

        changes.append((key, change))

    edit("config.json", "pooling_mode", "cls")
    edit("config.json", "hidden_act", "relu")
    edit("config_sentence_transformers.json", "prompts", {"query": "what ", "document": ""})
    found = {sentence_models.load_model(str(bi)).identity}
    for number, (_, change) in enumerate(changes):
        copy = tmp_path / str(number)
        shutil.copytree(bi, copy)
        change(copy)
        found.add(sentence_models.load_model(str(copy)).identity)
    model = sentence_models.load_model(str(bi)).model
    model.max_seq_length = 7
    found.add(sentence_models.describe(model).identity)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-4)
    found.add(sentence_models.describe(model).identity)
    cast(Any, model).truncate_dim = 8  # saved with the model
    found.add(sentence_models.describe(model).identity)
    assert len(found) == 7
    assert sentence_models.load_model(str(bi)).identity in found
