"""The benchmark of distillation: what each arm learns from and is measured on, and that its figures are those of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stillroom_server.distillery.recipe import Recipe, ready
from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import Corpus
from stillroom_shared.errors import SettingsError
from stillroom_simulations.distill_bench.arms import arms
from stillroom_simulations.distill_bench.run import Asked, bench_distill, system_of

ANIMALS = ["tapir", "zebra", "lion", "otter", "heron", "gecko", "moth", "crab", "newt", "ibex", "koala", "lemur"]


def written(folder: Path, *, train: bool) -> Path:
    """A BEIR folder: a passage and a query for each animal, two of three queries to learn from if `train`."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": a, "text": f"The {a} of {folder.name} eats leaves and sleeps by the river."} for a in ANIMALS]
    queries = [{"_id": f"q-{a}", "text": f"what does the {a} of {folder.name} eat"} for a in ANIMALS]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    split = {a: "train" if train and n % 3 else "test" for n, a in enumerate(ANIMALS)}
    for one in {*split.values()}:
        rows = [f"q-{a}\t{a}\t1" for a in ANIMALS if split[a] == one]
        (folder / "qrels" / f"{one}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Path, Corpus]:
    """One set with queries to learn from, and one without."""
    below = tmp_path_factory.mktemp("sets")
    folders = [written(below / "zoo", train=True), written(below / "ark", train=False)]
    return {folder: load_beir(folder, splits="as-published") for folder in folders}


def test_a_set_left_out_teaches_nothing_to_those_measured_on_it(corpora: Mapping[Path, Corpus]) -> None:
    """Guards against figures of sets "left out" whose passages or queries were learned from."""
    found = {arm.name: arm for arm in arms(["left-out"], [], corpora, {}, passages=None)}
    assert set(found) == {"zoo", "ark"}
    for folder, corpus in corpora.items():
        arm = found[corpus.name]
        assert arm.sets == (corpus.name,)
        assert [source.data for source in arm.recipe.data.sources if source.kind == "beir"] == [
            str(other) for other in corpora if other != folder
        ]
        assert set(arm.recipe.data.exclude.folders) == set(corpora)


def test_every_recipe_learns_from_the_same_text_but_for_the_one_without_any(corpora: Mapping[Path, Corpus]) -> None:
    """Guards against a recipe that looks better because it was given more to learn from."""
    found = list(arms(["recipes"], list(ready()), corpora, {}, passages=5))
    assert found[0].name == "align" and {arm.name for arm in found} == set(ready())
    sources = {arm.name: arm.recipe.data.sources for arm in found}
    assert sources.pop("data-free") == ()
    assert len({*sources.values()}) == 1
    assert [source.kind for source in sources["align"]] == [
        "docstrings",
        "beir",
    ]  # no queries to learn from in the other
    assert found[0].of_seed(3).seed == 3 and found[0].folder(Path("x"), 3) == Path("x/recipes/align-seed-3")
    with pytest.raises(SettingsError, match="family 'leftout' is unknown"):
        list(arms(["leftout"], [], corpora, {}, passages=None))


def test_a_model_is_measured_over_the_document_tower_that_it_is_for(tmp_path: Path) -> None:
    """Guards against queries of a rotated space over passages of the teacher's: both load, and nothing is found."""
    aligned = next(iter(arms(["recipes"], ["align"], {}, {}, passages=None))).recipe
    assert system_of(aligned, tmp_path) == f"{tmp_path}::offline"
    assert system_of(Recipe(), tmp_path) == str(tmp_path)
    (tmp_path / "documents").mkdir()
    assert system_of(aligned, tmp_path) == f"{tmp_path}::{tmp_path}/documents"


def test_figures_are_those_of_the_runs_and_a_second_call_does_nothing(
    corpora: Mapping[Path, Corpus], tmp_path: Path
) -> None:
    """Guards against means over the wrong seeds, a student scored as its teacher, and hours of work done twice."""
    asked = Asked(
        data=list(corpora),
        families=["recipes"],
        recipes=["align"],
        seeds=[0, 1],
        passages=None,
        packages=["fsspec"],
        changes={"training.epochs": "1", "data.synthetic.passages": "20"},
        timed=0,
        sentences=0,
        folder=tmp_path / "runs",
        cache=tmp_path / "cache",
    )
    out = tmp_path / "distill.json"
    made = bench_distill(asked, out=out, console=Console(quiet=True), command="stillroom bench distill")
    assert json.loads(out.read_text())["figures"] == made["figures"]
    runs = [json.loads((tmp_path / f"runs/recipes/align-seed-{n}/measured/found.json").read_text()) for n in (0, 1)]
    for name in ("zoo", "ark"):
        students = [np.mean(run["sets"][name]["student"]["scores"]) for run in runs]
        teacher = np.mean(runs[0]["sets"][name]["teacher"]["scores"])
        figure = made["figures"][f"recipes.align.{name}.ndcg_at_10"]
        assert figure["value"] == pytest.approx(np.mean(students)) and figure["interval"][0] <= figure["value"]
        kept = made["figures"][f"recipes.align.{name}.kept"]["value"]
        assert kept == pytest.approx(np.mean(students) / teacher)
    weights = [(tmp_path / f"runs/recipes/align-seed-{n}/student/model.safetensors").read_bytes() for n in (0, 1)]
    assert weights[0] != weights[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    again = bench_distill(asked, out=out, console=Console(quiet=True), command="stillroom bench distill")
    assert again["figures"] == made["figures"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")} == before
