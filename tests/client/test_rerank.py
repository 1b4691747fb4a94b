"""The last stage: what the reranker reads again, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from tests.references.blending import blended
from tests.scorers import trained
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.records import mine_records
from stillroom_client.rerank import Reranker
from stillroom_client.scoring import ndcg
from stillroom_client.search import CacheLimits, Device, Encoder
from stillroom_server.rerankers import with_reranker
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import ReleaseError, SettingsError
from stillroom_shared.release import Release
from stillroom_shared.signing import SigningKey

ANIMALS = ["tapir", "okapi", "numbat", "kakapo"]
TEXTS = {"list": "{0} {0} {0} list.", "bank": "The {0} of the river bank.", "diet": "The {0} eats leaves."}


@pytest.fixture(scope="module")
def release(
    tmp_path_factory: pytest.TempPathFactory, tiny_release: Release, tiny_tokenizer: PreTrainedTokenizerFast,
    signing_key: SigningKey,
) -> Release:  # fmt: skip
    folder = tmp_path_factory.mktemp("reranking")
    scorer: CrossEncoder = trained(folder / "model", tiny_tokenizer)
    return with_reranker(folder / "release", tiny_release, scorer, key=signing_key, tokens=48)[0]


@pytest.fixture
def device(tmp_path: Path, release: Release) -> Device:
    own = Device.create(tmp_path / "home", release, link=True)
    own.add([Passage(f"{a}-{kind}", "zoo", text.format(a), "") for a in ANIMALS for kind, text in TEXTS.items()])
    return own


def test_reranking_puts_the_better_answer_first(device: Device) -> None:
    """Guards against scores that are computed and not used, and those of one passage given to another."""
    before, after = [], []
    for animal in ANIMALS:
        query = f"what does the {animal} do"
        plain, again = (device.search(query, 3, mode="bm25", rerank=n) for n in (0, 20))
        before.append(ndcg([hit.passage_id for hit in plain], {f"{animal}-diet"}, 3))
        after.append(ndcg([hit.passage_id for hit in again], {f"{animal}-diet"}, 3))
        assert {hit.passage_id for hit in again} == {hit.passage_id for hit in plain}
        assert {hit.passage_id: hit.bm25_rank for hit in again} == {hit.passage_id: hit.bm25_rank for hit in plain}
        told = device.search(query, 20, mode="bm25")  # all that was read, with the scores of the stage before
        logits = Reranker(device.release).logits(query, [hit.text for hit in told])
        scores = blended([hit.score for hit in told], logits.tolist())
        both = dict(zip((hit.passage_id for hit in told), scores, strict=True))
        expected = [1 / (1 + math.exp(-both[hit.passage_id])) for hit in again]
        assert [hit.score for hit in again] == pytest.approx(expected)
        assert [hit.rank for hit in again] == [1, 2, 3] and (np.diff(expected) <= 0).all()
    assert np.mean(after) == 1.0 > np.mean(before) + 0.2


def test_it_reads_the_best_n_and_at_least_what_is_shown(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against results on two scales in one list, and a reranker that reads the whole index."""
    read: list[int] = []
    real = Reranker.logits

    def counted(self: Reranker, query: str, passages: list[str]) -> NDArray[np.float64]:
        read.append(len(passages))
        return real(self, query, passages)

    monkeypatch.setattr(Reranker, "logits", counted)
    for k, n, expected in ((3, 5, 5), (7, 5, 7), (3, 1, 3), (50, 20, 12), (3, 0, None)):
        read.clear()
        hits = device.search("tapir", k, mode="dense", rerank=n)
        assert len(hits) == min(k, 12) and read == ([] if expected is None else [expected])
        if n:
            fused = device.search("tapir", max(k, n), mode="dense")
            assert {hit.passage_id for hit in hits} <= {hit.passage_id for hit in fused}
    assert device.search("zyx", mode="bm25", rerank=5) == []
    with pytest.raises(SettingsError, match="rerank = -1"):
        device.search("tapir", rerank=-1)


def test_scores_do_not_depend_on_neighbours_or_threads(release: Release) -> None:
    """Guards against a batch whose quantization makes a passage's score that of its company."""
    texts = [text.format(a) for a in ANIMALS for text in TEXTS.values()] + ["leaves " * 200, ""]
    alone = [Reranker(release).logits("what does the tapir do", [text])[0] for text in texts]
    for threads in (1, 4):
        assert Reranker(release, threads=threads).logits("what does the tapir do", texts).tolist() == alone
    assert len(Reranker(release).logits("x", [])) == 0
    assert np.isfinite(Reranker(release).logits("tapir " * 500, texts)).all(), "a query longer than all tokens"


def test_a_reranked_answer_is_cached_as_such(device: Device) -> None:
    """Guards against a fused answer served as a reranked one, and a near hit that no reranker read."""
    device.close()
    device = Device.open(device.home, cache=CacheLimits(near=0.01))
    fused = device.search("what does the tapir do", 3)
    again = device.search("what does the tapir do", 3, rerank=20)
    assert {hit.cached for hit in again} == {None} and again != fused
    assert {hit.cached for hit in device.search("what does the tapir do", 3, rerank=20)} == {"what does the tapir do"}
    assert {hit.cached for hit in device.search("What does the tapir do?", 3, rerank=20)} == {None}
    near = device.search("What does the tapir do?", 3)
    assert {hit.cached for hit in near} == {"what does the tapir do"}, "the guard: it is near"
    device.close()


def test_another_reranker_answers_anew(
    device: Device, release: Release, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, signing_key: SigningKey
) -> None:
    """Guards against answers of the reranker before, which a release with the same towers replaces without a generation."""
    query = "what does the okapi do"
    before = device.search(query, 3, mode="bm25", rerank=20)
    scorer: CrossEncoder = trained(tmp_path / "model", tiny_tokenizer)
    assert scorer.model is not None
    for name, weights in scorer.model.named_parameters():
        if name.startswith("classifier"):
            weights.data.neg_()
    other = with_reranker(tmp_path / "other", release, scorer, key=signing_key, tokens=48)[0]
    device.upgrade(other.folder)
    after = device.search(query, 3, mode="bm25", rerank=20)
    assert after == device.search(query, 3, mode="bm25", rerank=20, cached=False) != before
    assert {hit.cached for hit in after} == {None}


def test_a_release_without_a_reranker_says_so(tmp_path: Path, tiny_release: Release) -> None:
    """Guards against a stage that is left out in silence."""
    with Device.create(tmp_path / "home", tiny_release, link=True) as plain:
        plain.add([Passage("p", "zoo", "A tapir.", "")])
        with pytest.raises(ReleaseError, match="brings no reranker: search without it"):
            plain.search("tapir", rerank=20)
    arguments = ["search", "tapir", "--home", str(tmp_path / "home")]
    done = CliRunner().invoke(build_app(), [*arguments, "--rerank"])
    assert done.exit_code == 1 and "brings no reranker" in done.output
    assert CliRunner().invoke(build_app(), arguments).exit_code == 0


def test_the_command_line_reranks(device: Device) -> None:
    """Guards against an option that is parsed and forgotten."""
    device.close()
    arguments = ["search", "what does the okapi do", "--home", str(device.home), "--mode", "bm25", "-k", "1", "--json"]
    plain, again = (CliRunner().invoke(build_app(), [*arguments, *more]).output for more in ([], ["--rerank"]))
    assert "okapi-diet" in again and "okapi-diet" not in plain


def test_training_never_sees_the_reranker(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against candidates in an order, or of a choice, that the accounting knows nothing of."""
    device.record([("what does the tapir do", "tapir-diet")])
    encoder = Encoder(device.release)
    [before] = mine_records(device, encoder, candidates=4)
    device.search("what does the tapir do", rerank=20)
    monkeypatch.setattr(Reranker, "__init__", lambda *_, **__: pytest.fail("mining asked for the reranker"))
    [after] = mine_records(device, encoder, candidates=4)
    np.testing.assert_array_equal(before.candidates, after.candidates)
