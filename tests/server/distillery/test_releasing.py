"""From a recipe's model to a release: what devices search with, and what it says of its text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from tests.scorers import trained
from tests.server.distillery.gathering import beir
from tests.server.distillery.learners import DIM, read, tower
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_server.distillery.recipe import load_recipe
from stillroom_server.distillery.releasing import create_release
from stillroom_server.distillery.run import Run
from stillroom_server.distillery.stages import STAGES
from stillroom_shared.cli import build_app
from stillroom_shared.corpus import Passage
from stillroom_shared.errors import ReleaseError
from stillroom_shared.progress import Progress
from stillroom_shared.release import Release, open_release
from stillroom_shared.settings import AdapterSettings
from stillroom_shared.signing import SigningKey


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """What `distill run` leaves of a student of one layer."""
    folder = tmp_path_factory.mktemp("run")
    zoo = beir(folder / "zoo", {"train": [("q-tapir", "tapir", 1), ("q-zebra", "zebra", 1)]})
    path = folder / "recipe.toml"
    path.write_text(
        f'documents = "minilm"\n[teachers.minilm]\nmodel = "{teacher}"\npassage_tokens = 20\n[student]\nlayers = [0]\n'
        "tokens = 16\n[losses.cosine]\nweight = 1.0\n[training]\nepochs = 30\nlearning_rate = 5e-3\n"
        f'[data.negatives]\ncount = 0\n[[data.sources]]\nkind = "beir"\ndata = "{zoo}"\nlicence = "CC0"\n'
    )
    run = Run(load_recipe(str(path), {}), folder / "out", folder / "cache")
    return run.all_stages(Progress(STAGES, console=Console(quiet=True)))


def test_a_distilled_model_becomes_a_release_that_devices_search_with(
    model: Path, teacher: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Guards against towers that are swapped, tokens that nobody read, and a release that does not say what it learned from."""
    trained(tmp_path / "cross", tiny_tokenizer)
    words = ["release", "create", str(model), str(tmp_path / "release"), "--key", str(tmp_path / "operator.key")]
    done = CliRunner().invoke(build_app(), [*words, "--reranker", str(tmp_path / "cross"), "--set", "adapter.rank=2"])
    assert done.exit_code == 0, done.output
    assert (
        "operator.key is new: keep it" in done.output and "zoo: CC0" in done.output and "with a reranker" in done.output
    )
    release = open_release(tmp_path / "release", trusted_key=SigningKey.load(tmp_path / "operator.key").public)
    assert (release.query_tokens, release.document_tokens) == (16, 20)
    assert (release.adapter_spec.rank, release.adapter_spec.layers, release.has_reranker) == (2, (0,), True)
    texts = ["what does the tapir eat", "the river bank"]
    for folder, own in ((release.folder, model), (release.folder / "document", teacher)):
        vectors = [SentenceTransformer(str(one), device="cpu").encode(texts) for one in (folder, own)]
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    [source] = release.sources or []
    assert source["name"] == "zoo" and source["facts"]["licence"] == "CC0" and source["facts"]["texts"] > 0
    assert str(tmp_path.parent) not in (release.folder / "sources.json").read_text()
    with Device.create(tmp_path / "home", release, link=True) as device:
        device.add([Passage("p", "zoo", "The tapir eats leaves.", ""), Passage("r", "zoo", "The river bank.", "")])
        assert {hit.passage_id for hit in device.search("what does the tapir eat", 2, rerank=2)} == {"p", "r"}
    shown = CliRunner().invoke(build_app(), ["release", "verify", str(release.folder)])
    assert "learned from:\n  zoo: CC0\n" in shown.output and "every file and the signature hold" in shown.output
    (release.folder / "sources.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"sources\.json"):
        open_release(release.folder, trusted_key=None)


def test_a_model_that_says_nothing_of_itself_needs_its_document_tower(
    model: Path, teacher: Path, tmp_path: Path
) -> None:
    """Guards against a document tower that is guessed, and one of another space: every answer would be noise."""
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "distillation.json").unlink()
    key = SigningKey.generate()
    with pytest.raises(ReleaseError, match=r"has no distillation.json.*name the document tower"):
        create_release(bare, tmp_path / "release", key=key)
    made = create_release(bare, tmp_path / "release", key=key, documents=str(teacher), adapter=AdapterSettings(rank=2))
    assert made.sources is None
    alone = create_release(bare, tmp_path / "alone", key=key, documents=str(bare), adapter=AdapterSettings(rank=2))
    assert alone.document_tokens == 16
    shown = CliRunner().invoke(build_app(), ["release", "verify", str(made.folder)])
    assert "what public text it learned from is not recorded" in shown.output


def test_what_devices_cannot_run_is_refused(
    model: Path, folder: Path, tmp_path: Path, tiny_release: Release, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Guards against a release that is sealed, and answers noise or fails on the first device."""

    def saved(name: str, *more: nn.Module, **options: object) -> Path:
        made = SentenceTransformer(modules=[read(folder), Pooling(DIM, "mean"), *more], device="cpu", **options)  # type: ignore[arg-type]
        made.save_pretrained(str(tmp_path / name), create_model_card=False)
        return tmp_path / name

    turned = shutil.copytree(model, tmp_path / "turned")
    facts = json.loads((turned / "distillation.json").read_text())
    facts["recipe"]["rotate"] = True
    (turned / "distillation.json").write_text(json.dumps(facts))
    other = shutil.copytree(folder, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {
        f"{word}x" if word.isalpha() else word: row for word, row in words["model"]["vocab"].items()
    }
    (other / "tokenizer.json").write_text(json.dumps(words))
    tower(other).save_pretrained(str(tmp_path / "renamed"))
    narrow = saved("narrow", Dense(DIM, 8, activation_function=nn.Identity()), Normalize())
    for query, documents, said in (
        (turned, None, "was made with rotate"),
        (model, str(saved("prompted", Normalize(), prompts={"query": "ask: "})), "puts 'ask: ' before a text"),
        (narrow, str(narrow), "ShapedBertModel"),
        (model, str(narrow), "gives vectors of 32 values and .* of 8"),
        (model, str(saved("apart", Normalize())), r"does not place queries where .*mean cosine -?0\.\d\d"),
        (model, str(tmp_path / "renamed"), "different vocabularies"),
    ):
        with pytest.raises(ReleaseError, match=said):
            create_release(query, tmp_path / "refused", key=SigningKey.generate(), documents=documents)
        assert not (tmp_path / "refused").exists()
