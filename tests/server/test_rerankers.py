"""A cross-encoder in a release: the same scores, covered by hashes and signature, and nothing to older devices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from sentence_transformers import CrossEncoder
from tests.scorers import trained
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from stillroom_client.rerank import PairScorer, Reranker
from stillroom_server.bert_graph import Graph, hidden_states
from stillroom_server.publish import publish_release
from stillroom_server.rerankers import export_reranker, with_reranker
from stillroom_shared.errors import ReleaseError
from stillroom_shared.release import ONNX_FILES, Release, open_release
from stillroom_shared.signing import SigningKey

PAIRS = [
    ("what does the tapir do", "The okapi eats leaves."),
    ("what does the tapir do", "tapir tapir list."),
    ("open a zip file", "List the members of a zip file. " * 9),
    ("", ""),
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> CrossEncoder:
    return trained(tmp_path_factory.mktemp("scorer") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def reranking(
    tmp_path_factory: pytest.TempPathFactory, tiny_release: Release, scorer: CrossEncoder, signing_key: SigningKey
) -> Release:
    folder = tmp_path_factory.mktemp("release") / "with"
    return with_reranker(folder, tiny_release, scorer, key=signing_key, tokens=48)[0]


def test_the_device_scores_as_the_cross_encoder_does(reranking: Release, scorer: CrossEncoder) -> None:
    """Guards against pairs in the wrong order, missing token types, another truncation, and a classifier that was lost."""
    scorer.max_seq_length = 48
    truth = scorer.predict(PAIRS, convert_to_numpy=True, activation_fn=None)
    device = Reranker(reranking)

    def logits(pairs: list[tuple[str, str]]) -> NDArray[np.float64]:
        return np.array([device.logits(query, [passage])[0] for query, passage in pairs])

    assert np.ptp(truth) > 0.3, "the guard: these scores differ"
    expected = np.log(truth / (1 - truth))
    np.testing.assert_allclose(logits(PAIRS), expected, atol=0.05)
    assert np.abs(logits([(passage, query) for query, passage in PAIRS]) - expected).max() > 0.1, "the order matters"


def test_the_last_layer_is_computed_for_the_first_token_alone_and_gives_the_same(
    tmp_path: Path, scorer: CrossEncoder, reranking: Release
) -> None:
    """Guards against a row of another text or of padding, keys of one token, a layer in full, and refusing earlier files."""
    model, tokenizer = scorer.model, scorer.tokenizer
    assert isinstance(model, BertForSequenceClassification) and model.bert.pooler is not None
    limits: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 48, "return_tensors": "np"}
    batch = tokenizer([a for a, _ in PAIRS[:3]], [b for _, b in PAIRS[:3]], **limits)
    with torch.inference_mode():
        truth = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.numpy()
    path, earlier = reranking.folder / "reranker" / ONNX_FILES["float32"], tmp_path / "earlier.onnx"
    file = onnx.load(path)
    watched = [
        f"encoder.layer.1.{part}.product" for part in ("attention.self.key", "attention.self.query", "output.dense")
    ]
    file.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in watched)
    found, *rows = InferenceSession(file.SerializeToString()).run(["logits", *watched], dict(batch))
    np.testing.assert_allclose(found, truth, atol=1e-5)
    assert np.ptp(truth) > 0.1 and [len(own) for own in rows] == [batch["input_ids"].size, 3, 3]

    graph = Graph()  # every token in every layer, as it was written before
    states = hidden_states(graph, model.bert, out="last_hidden_state")
    first = graph.add("Gather", states, graph.constant("first", 0), out="first_state", axis=1)
    pooled = graph.add("Tanh", graph.linear(first, model.bert.pooler.dense, "pooler.dense"), out="pooled")
    onnx.save(graph.model(graph.linear(pooled, model.classifier, "logits"), ("batch", 1)), earlier)
    words = (reranking.folder / "reranker" / "tokenizer.json").read_bytes()
    logits = [
        [PairScorer(words, one.read_bytes(), 48).logits(query, [passage])[0] for query, passage in PAIRS]
        for one in (path, earlier)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_export_says_how_far_it_is_off_and_refuses_what_is_not_the_model(
    tmp_path: Path, scorer: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an export that is never compared, or compared with itself."""
    done = export_reranker(scorer, tmp_path / "a", tokens=48, pairs=PAIRS)
    assert done.pairs == 4 and done.float_error < 1e-4 and 0 < done.int8_error < 0.1 * done.spread
    loaded = CrossEncoder(str(tmp_path / "a" / "reranker"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(loaded.predict(PAIRS[:2]), scorer.predict(PAIRS[:2]), atol=1e-5)
    from stillroom_server import rerankers

    real = rerankers._export

    def other(model: BertForSequenceClassification, path: Path) -> None:
        model.classifier.bias.data += 0.1
        real(model, path)
        model.classifier.bias.data -= 0.1

    monkeypatch.setattr(rerankers, "_export", other)
    with pytest.raises(ReleaseError, match=r"off by 0.1 in a logit"):
        export_reranker(scorer, tmp_path / "b", tokens=48)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, scorer: CrossEncoder) -> None:
    """Guards against paths or times of the exporting machine in a release."""
    for name in ("a", "b"):
        export_reranker(scorer, tmp_path / name, tokens=48)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert Path("reranker/onnx/model_qint8_avx512_vnni.onnx") in files
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
        assert str(tmp_path).encode() not in (tmp_path / "a" / path).read_bytes(), path


def test_hashes_and_signature_cover_the_reranker(tmp_path: Path, reranking: Release, signing_key: SigningKey) -> None:
    """Guards against a reranker that somebody swapped on the way."""
    names = [name for name in reranking.manifest.files if name.startswith("reranker/")]
    assert {"reranker/tokenizer.json", "reranker/reranker.json", "reranker/onnx/model.onnx"} <= set(names)
    for name in names:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(reranking.folder, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ReleaseError, match="altered"):
            open_release(folder, trusted_key=signing_key.public)
        shutil.rmtree(folder)
    copied = tmp_path / "late"
    shutil.copytree(reranking.folder, copied)
    opened = open_release(copied, trusted_key=signing_key.public)
    (copied / "reranker/reranker.json").write_text('{"schema_version": 1, "tokens": 9}')
    with pytest.raises(ReleaseError, match="altered since"):
        Reranker(opened)


def test_a_child_with_a_reranker_keeps_towers_and_indexes(
    reranking: Release, tiny_release: Release, signing_key: SigningKey
) -> None:
    """Guards against a reranker that costs every device its index; and what an older device sees of it: nothing."""
    assert reranking.has_reranker and not tiny_release.has_reranker
    assert reranking.document_tower_hash == tiny_release.document_tower_hash
    assert reranking.manifest.query_tower_hash == tiny_release.manifest.query_tower_hash
    assert (reranking.manifest.parent, reranking.id != tiny_release.id) == (tiny_release.id, True)
    # A closed schema: what an older version would refuse is a field that it does not know.
    manifests = [json.loads((one.folder / "manifest.json").read_text()) for one in (tiny_release, reranking)]
    assert manifests[0].keys() == manifests[1].keys() and manifests[1]["schema_version"] == 1


def test_publish_takes_a_reranker(
    tmp_path: Path, tiny_release: Release, tiny_towers: tuple[BertModel, BertModel], tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey, scorer: CrossEncoder,
) -> None:  # fmt: skip
    """Guards against a reranker that can be added only to what is published already; also from a folder."""
    scorer.save_pretrained(str(tmp_path / "saved"))
    release = publish_release(
        tmp_path / "release", query_tower=tiny_towers[0], document_tower=tiny_release, tokenizer=tiny_tokenizer,
        spec=tiny_release.adapter_spec, adapter=None, key=signing_key, parent=None, adapter_round=0, privacy_statement=None,
        query_tokens=16, document_tokens=48,
        extras=lambda folder: export_reranker(tmp_path / "saved", folder, tokens=48),
    )  # fmt: skip
    assert release.has_reranker and Reranker(release).tokens == 48


def test_what_is_no_reranker_is_refused(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    scorer: CrossEncoder,
    reranking: Release,
    signing_key: SigningKey,
) -> None:
    """Guards against two scores where one is read, positions that a model does not know, and half a reranker."""
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    config.num_labels = 2
    BertForSequenceClassification(config).save_pretrained(tmp_path / "two")
    tiny_tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(ReleaseError, match="with 2 outputs: give a BERT with one score"):
        export_reranker(tmp_path / "two", tmp_path / "x")
    for tokens in (7, 65):
        with pytest.raises(ReleaseError, match="choose 8 to 64"):
            export_reranker(scorer, tmp_path / "y", tokens=tokens)
    from stillroom_shared.release import seal_release

    half = tmp_path / "half"
    shutil.copytree(reranking.folder, half)
    (half / "reranker/tokenizer.json").unlink()
    fields = reranking.manifest.model_dump(include={"dimension", "query_tokens", "document_tokens", "adapter_round"})
    fields |= {"parent": None, "privacy_statement": None, "adapter_spec": reranking.adapter_spec}
    with pytest.raises(ReleaseError, match=r"a reranker without reranker/tokenizer\.json"):
        seal_release(half, fields, signing_key)
