"""The benchmark of distillation: what each arm learns from and is measured on, and that its figures are those of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file
from tests.simulations import shelves

from stillroom_server.distillery.losses.needs import needs
from stillroom_server.distillery.recipe import Recipe, ready
from stillroom_server.distillery.training.reading import OF_TEXTS
from stillroom_shared.beir import load_beir
from stillroom_shared.corpus import Corpus
from stillroom_shared.errors import SettingsError
from stillroom_simulations.distill_bench.arms import FAMILIES, TRAINED, Public, arms, load_studies
from stillroom_simulations.distill_bench.measuring import system_of
from stillroom_simulations.distill_bench.run import Asked, bench_distill
from stillroom_simulations.distill_bench.tables import of_distill

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerFast

ANIMALS = ["tapir", "zebra", "lion", "otter", "heron", "gecko", "moth", "crab", "newt", "ibex", "koala", "lemur"]
QUIET = Console(quiet=True)


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


STUDIES = """
[taught.cross]
recipe = "margin-mse"
text = "labelled"
docstrings = 0
settings = ["data.synthetic.makers=", "data.negatives.count=3", "data.negatives.relative_margin=none", "teach.model={bi}",
  "teach.batch_size=4", "teach.pair_tokens=48", "teach.candidates=4", "teach.held_out=0.4", "teach.checkpoints=1"]

[families.recipes]
text = "labelled"
docstrings = 0
untrained = true
settings = ["student.layers=0,1", "training.epochs=1", "training.batch_size=2", "data.negatives.relative_margin=none",
  "student.tokens=32"]

[[arms]]
family = "recipes"
name = "align"

[[arms]]
family = "recipes"
name = "matryoshka"
recipe = "matryoshka"
settings = ["losses.matryoshka.dims=8,16"]
above = ["align"]

[[arms]]
family = "recipes"
name = "rerank"
recipe = "rerank"
taught = "cross"
first = "bm25"
settings = ["data.negatives.count=3", "student.tokens=48", "student.layers=1", "scorers=cross"]

[[arms]]
family = "matryoshka"
name = "matryoshka"
model_of = "recipes.matryoshka"
cut = [8]

[families.docstrings]
settings = ["training.epochs=1", "student.tokens=32", "data.synthetic.makers=crop"]

[[arms]]
family = "docstrings"
name = "base"
text = "labelled"
docstrings = 0
settings = ["student.layers=1"]

[[arms]]
family = "left-out"
name = "align"
text = "others"
docstrings = 0
continues = "docstrings.base"
settings = ["training.epochs=1", "student.tokens=32", "data.synthetic.makers=crop", "student.layers=1",
  "training.learning_rate=1e-6", "training.batch_size=4"]

[memory]
texts = [50, 150]
steps = 2

[rates]
sentences = 4
repeats = 2
"""


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, corpora: Mapping[Path, Corpus], tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Asked:  # fmt: skip
    """A small study with a tiny teacher, of two seeds."""
    below = tmp_path_factory.mktemp("bench")
    bi = shelves.bi_encoder(below / "bi", tiny_towers[1], tiny_tokenizer)
    (below / "studies.toml").write_text(STUDIES.replace("{bi}", str(below / "bi" / "tower")))
    changes = {"teachers.minilm.model": str(bi)}
    return Asked(
        data=list(corpora), families=["recipes"], studies=below / "studies.toml", seeds=[0, 1], packages=["fsspec"],
        changes=changes, timed=0, folder=below / "runs", cache=below / "cache",
    )  # fmt: skip


def test_the_file_that_comes_with_stillroom_holds_every_recipe_and_family(corpora: Mapping[Path, Corpus]) -> None:
    """Guards against a recipe that nobody measures, and settings that no longer fit one."""
    studies = load_studies()
    assert {one.recipe for one in studies.arms if one.family == "recipes"} == set(ready())
    assert {one.family for one in studies.arms} == set(TRAINED) < set(FAMILIES)
    every = studies.model_copy(update={"arms": tuple(one.model_copy(update={"sets": ()}) for one in studies.arms)})
    found = list(arms(every, TRAINED, Public(corpora=corpora), {"training.epochs": "7"}))
    assert all(arm.recipe.training.epochs == 7 for arm in found)  # the command line wins
    assert found[0].title == "recipes.align"
    for name, one in studies.taught.items():
        assert Public(corpora=corpora).recipe(one, {}).teaches_first, name
    teachers = {arm.settings.name: arm for arm in found if arm.settings.family == "teachers"}
    assert len({arm.recipe.data for arm in teachers.values()}) == 1, "arms of teachers learn from different text"


def test_arms_of_teachers_differ_in_who_ranks_alone(corpora: Mapping[Path, Corpus]) -> None:
    """Guards against a baseline of half the steps, and a teacher whose raw scores ask for a flat ranking."""
    studies = load_studies()
    every = studies.model_copy(update={"arms": tuple(one.model_copy(update={"sets": ()}) for one in studies.arms)})
    found = {arm.settings.name: arm.recipe for arm in arms(every, ["teachers"], Public(corpora=corpora), {})}
    assert len({recipe.training for recipe in found.values()}) == 1
    for name, recipe in found.items():
        assert needs(recipe.losses) - OF_TEXTS, f"{name} learns from texts alone, the others from lists as well"
        assert recipe.normalises_one, f"{name} has scores of another scale"
    reranker = next(one for one in studies.arms if one.family == "recipes" and one.name == "rerank")
    assert not reranker.above  # its first stage is the teacher: that alone is above a student


def test_a_set_left_out_teaches_nothing_to_those_measured_on_it(corpora: Mapping[Path, Corpus]) -> None:
    """Guards against figures of sets "left out" whose passages or queries were learned from."""
    found = {arm.out: arm for arm in arms(load_studies(), ["left-out"], Public(corpora=corpora), {})}
    assert set(found) == {"zoo", "ark"}
    for folder, corpus in corpora.items():
        arm = found[corpus.name]
        assert arm.sets == (corpus.name,)
        assert [source.data for source in arm.recipe.data.sources if source.kind == "beir"] == [
            str(other) for other in corpora if other != folder
        ]
        assert set(arm.recipe.data.exclude.folders) == set(corpora)
    assert found["zoo"].folder(Path("x"), 3) == Path("x/left-out/align-without-zoo-seed-3")


def test_limits_and_shared_settings_reach_the_recipe(corpora: Mapping[Path, Corpus], asked: Asked) -> None:
    """Guards against a recipe that looks better because it was given more to learn from than its neighbours."""
    file = asked.studies.with_name("limits.toml")
    file.write_text(
        '[families.recipes]\ntext = "labelled"\nqueries = 5\npassages = 0\nsettings = ["training.epochs=2", "seed=4"]\n'
        '[[arms]]\nfamily = "recipes"\nname = "align"\nabove = ["align"]\nsettings = ["training.epochs=1"]\n'
    )
    with pytest.raises(SettingsError, match="compared with 'align', which is no arm before it"):
        load_studies(file)
    file.write_text(file.read_text().replace('above = ["align"]\n', "docstrings = 3\nwordnet = 7\n"))
    [arm] = arms(load_studies(file), ["recipes"], Public(corpora=corpora), {})
    assert arm.recipe.training.epochs == 1 and arm.recipe.seed == 4 and arm.of_seed(3, {}).seed == 3
    docstrings, wordnet, zoo = arm.recipe.data.sources  # nothing to learn from is labelled in the other set
    assert (docstrings.kind, docstrings.queries, docstrings.passages) == ("docstrings", 3, 0)
    assert (wordnet.kind, wordnet.use, wordnet.queries) == ("wordnet", "queries", 7)
    assert (zoo.kind, zoo.use, zoo.queries, zoo.passages) == ("beir", "pairs", 5, 0)
    with pytest.raises(SettingsError, match="family 'leftout' is unknown"):
        list(arms(load_studies(), ["leftout"], Public(corpora=corpora), {}))
    with pytest.raises(SettingsError, match="measured on 'squad', which --data does not give"):
        list(arms(load_studies(), ["teachers"], Public(corpora=corpora), {}))


def test_a_model_is_measured_over_the_documents_that_it_is_for(tmp_path: Path) -> None:
    """Guards against a student of a turned space that is compared with vectors of the space as it was."""
    made = {"teachers": {"large": {"model": "big"}}, "documents": "large"}
    recipe = Recipe.model_validate(made)
    assert system_of(recipe, tmp_path, cut=8) == f"{tmp_path}@8::big@8"
    (tmp_path / "documents").mkdir()
    assert system_of(recipe, tmp_path, tmp_path / "untrained") == f"{tmp_path}/untrained::{tmp_path}/documents"
    alone = recipe.model_copy(update={"documents": None})
    assert system_of(alone, tmp_path / "other", suffix="@int8") == f"{tmp_path}/other@int8"


def test_an_arm_goes_on_from_the_model_of_another(asked: Asked, tmp_path: Path) -> None:
    """Guards against a student that begins from the teacher again, or is compared with the model it began from."""
    bench_distill(replace(asked, families=["left-out"]), out=tmp_path / "x.json", console=QUIET, command="first")
    base, made = (
        load_file(asked.folder / place / "student" / "model.safetensors")
        for place in ("docstrings/base-seed-1", "left-out/align-without-zoo-seed-1")
    )
    other = load_file(asked.folder / "docstrings/base-seed-0/student/model.safetensors")
    moved, apart = (max(float((made[key] - one[key]).abs().max()) for key in made) for one in (base, other))
    assert 0 < moved < 1e-4 < apart  # a rate of 1e-6 takes it nowhere else: its layers are all that its base had
    studies = asked.studies.with_name("chain.toml")
    studies.write_text('[[arms]]\nfamily = "left-out"\nname = "a"\ntext = "others"\ncontinues = "left-out.b"\n')
    with pytest.raises(SettingsError, match=r"continues 'left-out\.b', which is no arm before it"):
        load_studies(studies)
    studies.write_text('[[arms]]\nfamily = "left-out"\nname = "b"\ntext = "others"\n' + studies.read_text())
    with pytest.raises(SettingsError, match="continue an arm of one model"):
        bench_distill(
            replace(asked, studies=studies, families=["left-out"]),
            out=tmp_path / "x.json",
            console=QUIET,
            command="second",
        )


def test_two_data_sets_of_one_name_are_refused(asked: Asked, tmp_path: Path) -> None:
    """Guards against figures of one set under the name of another."""
    twice = replace(asked, data=[*asked.data, written(tmp_path / "zoo", train=False)])
    with pytest.raises(SettingsError, match="two folders have one name"):
        bench_distill(twice, out=tmp_path / "x.json", console=QUIET, command="first")


def own_seconds(folder: Path) -> float:
    """Of training and exporting, without what was done for the model that it goes on from."""
    stages = (json.loads((folder / ".stages" / f"{one}.json").read_text()) for one in ("train", "export"))
    return sum(float(one["seconds"]) for one in stages)


def measured(asked: Asked, place: str, title: str, name: str) -> Any:
    return json.loads((asked.folder / place / "measured" / title / f"{name}.json").read_text())


def test_figures_are_those_of_the_runs_and_a_second_call_does_nothing(asked: Asked, tmp_path: Path) -> None:
    """Guards against means over the wrong seeds, a student scored as its teacher, and hours of work done twice."""
    out = tmp_path / "distill.json"
    made = bench_distill(asked, out=out, console=QUIET, command="stillroom bench distill")
    assert json.loads(out.read_text()) == made
    figures = made["figures"]
    for name in ("zoo", "ark"):
        runs = [measured(asked, f"recipes/align-seed-{n}", "recipes.align", name) for n in (0, 1)]
        students, untrained = (
            [np.mean(run[role]["scores"]) for run in runs] for role in ("student torch", "untrained torch")
        )
        teacher = np.mean(runs[0]["teacher torch"]["scores"])
        figure = figures[f"recipes.align.{name}.ndcg_at_10"]
        assert figure["value"] == pytest.approx(np.mean(students)) and figure["interval"][0] <= figure["value"]
        assert figures[f"recipes.align.{name}.kept"]["value"] == pytest.approx(np.mean(students) / teacher)
        assert figures[f"recipes.align.{name}.untrained.torch.ndcg_at_10"]["value"] == pytest.approx(np.mean(untrained))
    weights = [(asked.folder / f"recipes/align-seed-{n}/student/model.safetensors").read_bytes() for n in (0, 1)]
    assert weights[0] != weights[1]
    assert "first stage" in of_distill(made) and "untrained" in of_distill(made)
    assert (asked.folder / "teachers/cross/taught").is_dir()
    assert not list(asked.folder.glob("recipes/rerank-*/taught"))  # once, not for every seed

    def stamps() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in asked.folder.rglob("*")
            if path.suffix in (".safetensors", ".json")
        }

    before = stamps()
    again = bench_distill(asked, out=out, console=QUIET, command="stillroom bench distill")
    assert again["figures"] == figures and stamps() == before


def test_families_that_are_not_asked_for_keep_their_figures_while_they_hold(asked: Asked, tmp_path: Path) -> None:
    """Guards against a file that mixes seeds or settings, and against one that forgets an hour of measuring."""
    out = tmp_path / "distill.json"
    bench_distill(asked, out=out, console=QUIET, command="first")
    others = replace(asked, families=["matryoshka", "left-out"])
    made = bench_distill(others, out=out, console=QUIET, command="second")
    assert {name: one["command"] for name, one in made["families"].items()} == {
        "recipes": "first", "left-out": "second", "matryoshka": "second",
    }  # fmt: skip
    assert "recipes.align.zoo.ndcg_at_10" in made["figures"]
    assert not (asked.folder / "matryoshka" / "matryoshka-seed-0" / "model").exists()  # the model of the other family
    run = [measured(asked, f"recipes/matryoshka-seed-{n}", "matryoshka.matryoshka", "zoo") for n in (0, 1)]
    kept = np.mean([one["student torch@8"]["scores"] for one in run]) / np.mean(
        [one["student torch"]["scores"] for one in run]
    )
    assert made["figures"]["matryoshka.matryoshka.zoo.cut-8.kept"]["value"] == pytest.approx(kept)
    assert made["figures"]["left-out.align.mean.kept"]["goal"] == ">= 0.96"
    assert made["figures"]["left-out.align.seconds"]["value"] > own_seconds(
        asked.folder / "left-out/align-without-zoo-seed-0"
    )
    drawn = of_distill(made)
    assert "left-out align, mean of the sets" in drawn and "`second` at" in drawn and "`first` at" in drawn
    changed = replace(others, families=["matryoshka"], changes={**asked.changes, "losses.cosine.weight": "2"})
    with pytest.raises(SettingsError, match="left-out"):
        bench_distill(changed, out=out, console=QUIET, command="third")
    made = bench_distill(replace(changed, replace=True), out=out, console=QUIET, command="third")
    assert list(made["families"]) == ["matryoshka"]
