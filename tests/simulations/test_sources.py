"""Where text comes from: a cached corpus is the same corpus, and a folder needs to know what is public."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillroom_server.docstrings import DocstringSource
from stillroom_shared.errors import SettingsError
from stillroom_shared.settings import CorpusSettings
from stillroom_simulations import sources
from stillroom_simulations.sources import load_corpus


@pytest.fixture
def toy_source(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = DocstringSource(name="toy", public=("stillroom_shared",), private=("fsspec",))
    monkeypatch.setattr(sources, "_SOURCES", {"small": toy})


@pytest.mark.usefixtures("toy_source")
def test_a_cached_corpus_is_the_same_corpus_and_an_altered_one_is_refused(tmp_path: Path) -> None:
    """A cache that loses a field gives figures of another corpus under the same name."""
    first = load_corpus(CorpusSettings(), cache=tmp_path, workers=1)
    (cached,) = (tmp_path / "corpus").glob("*.json")
    again = load_corpus(CorpusSettings(), cache=tmp_path, workers=1)
    assert [corpus.content_hash for corpus in first] == [corpus.content_hash for corpus in again]
    assert first == again
    content = json.loads(cached.read_text())
    content["queries"][0][2] += " altered"
    cached.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="does not match its own hash"):
        load_corpus(CorpusSettings(), cache=tmp_path, workers=1)


def test_a_folder_needs_public_owners(tmp_path: Path) -> None:
    """Guessing which owners are public would train on private text."""
    (tmp_path / "qrels").mkdir()
    passages = [{"_id": f"p{i}", "text": f"text {i}", "metadata": {"owner": "ab"[i % 2]}} for i in range(8)]
    queries = [{"_id": f"q{i}", "text": f"query number {i}", "metadata": {"owner": "ab"[i % 2]}} for i in range(8)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (tmp_path / "qrels" / "train.tsv").write_text("".join(f"q{i}\tp{i}\t1\n" for i in range(8)))
    with pytest.raises(SettingsError, match=r"public_owners is empty.*its owners are a, b"):
        load_corpus(CorpusSettings(data=tmp_path), cache=tmp_path, workers=1)
    public, private = load_corpus(CorpusSettings(data=tmp_path, start_from=tmp_path), cache=tmp_path, workers=1)
    assert (len(public.passages), len(private.passages)) == (0, 8)
