"""Recipes: that each ready one is whole, what is refused, and that a run does every stage once."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tests.server.distillery.learners import WORDS, in_two_processes, lessons

from stillroom_server.distillery import rotation
from stillroom_server.distillery.early import refuse_early
from stillroom_server.distillery.lessons import Lessons
from stillroom_server.distillery.losses.settings import LossesSettings
from stillroom_server.distillery.recipe import Recipe, load_recipe, manual, ready
from stillroom_server.distillery.rotation import Rotation
from stillroom_server.distillery.run import Run, load_student
from stillroom_server.distillery.stages import STAGES, expected, planned, stage_keys
from stillroom_server.distillery.students.towers import bert_of
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.training.curriculum import Curriculum
from stillroom_server.distillery.training.train import Student
from stillroom_shared.errors import SettingsError
from stillroom_shared.progress import Progress, Stage
from stillroom_shared.settings_file import fields

NAMED = {
    "align", "colbert", "data-free", "listwise", "margin-mse", "matryoshka", "multi-teacher", "rerank",
    "search-architecture", "synthetic",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 40 passages, each with a query of its own words."""
    folder, generator = tmp_path_factory.mktemp("data") / "words", np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)
    rows = {name: list[str]() for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")}
    for number in range(40):
        words = [*generator.choice(WORDS, 8), str(number)]
        rows["corpus.jsonl"].append(json.dumps({"_id": f"p{number}", "text": " ".join(words) + "."}))
        rows["queries.jsonl"].append(json.dumps({"_id": f"q{number}", "text": " ".join([*words[:3], str(number)])}))
        rows["qrels/train.tsv"].append(f"q{number}\tp{number}\t1")
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def recipe(text: str, teacher: Path, data: Path, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    source = f'[[data.sources]]\nkind = "beir"\ndata = "{data}"\n[teachers.minilm]\nmodel = "{teacher}"\n'
    common = {"training.epochs": "1", "training.batch_size": "8", "student.layers": "0", "student.tokens": "16"}
    path.write_text(text + source)
    return load_recipe(str(path), common)


def finished(run: Run) -> str:
    """What the terminal shows."""
    console = Console(record=True, width=120)
    run.all_stages(Progress({name: STAGES[name] for name in planned(run.recipe)}, console=console))
    return console.export_text()


def test_every_ready_recipe_loads_and_says_what_it_makes() -> None:
    """Guards against a recipe that is shipped and names a setting that is gone."""
    assert set(ready()) == NAMED
    for name in ready():
        assert len(load_recipe(name, {}).about) > 20, name


def test_the_manual_page_of_recipes_is_current() -> None:
    """Guards against a manual of settings that are gone: `make docs` writes it."""
    page = Path(__file__).resolve().parents[3] / "docs" / "recipe-settings.md"
    assert page.read_text() == manual() + "\n"
    lacking = [key for key, field in fields(Recipe) if not field.description]
    assert not lacking


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no teacher"),
        ("documents = 'nobody'\n[teachers.minilm]\n", "documents is 'nobody': the teachers are minilm"),
        ("scorers = ['x']\n[teachers.minilm]\n", r"scorers\[0\] is 'x'"),
        ("documents = 'words'\n[teachers.words]\nkind = 'bm25'\n", "only a bi-encoder has a vector for each passage"),
        ("rotate = true\n[teachers.minilm]\n", "rotate: it is the space of `documents` that is turned"),
        (
            "rotate = true\ndocuments = 'minilm'\n[student]\nkind = 'late-interaction'\n[teachers.minilm]\n",
            "of kind tower or static",
        ),
        ("searches = true\n[teachers.minilm]\n", "in the space of `documents`"),
        ("[teachers.words]\nkind = 'bm25'\n[teachers.minilm]\nweight = 2.0\n", "begin from 'words', which is bm25"),
        (
            "[teachers.minilm]\n[pruning]\nheads = 0.5\nteacher = 'pruned'\n[losses.hidden_states]\nweight = 1.0\n",
            "pruning.teacher is pruned, and a loss compares layers",
        ),
        (
            "[teachers.minilm]\n[pruning]\nheads = 0.5\nteacher = 'pruned'\n[losses.margin_mse]\nweight = 1.0\n"
            "[losses.listwise_kl]\nweight = 1.0\nstudent_scale = 20.0\n",
            "losses have student_scale 1, 20: a student's scores are told at one scale",
        ),
        (
            "documents = 'minilm'\n[teachers.minilm]\n[pruning]\nheads = 0.5\nteacher = 'pruned'\n"
            "[training]\nranked = 'corpus'\n[losses.listwise_kl]\nweight = 1.0\nstudent_scale = 20.0\n",
            "losses have student_scale 20: .* and at 1 with training.ranked corpus",
        ),
        ("[teachers.minilm]\n", "gives no loss a weight"),
        ("[teachers.minilm]\n[losses.align]\nweight = 1.0\n", "losses.align.weight is unknown"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    """Guards against a mistake that is found after the teachers have worked for an hour."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load_recipe(str(path), {})
    with pytest.raises(SettingsError, match="no file and no ready one: those are align"):
        load_recipe("alignment", {})


def test_a_run_makes_a_model_and_does_each_stage_once(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against stages that run again although nothing changed, and against a file that is not the student."""
    chosen = recipe(
        "documents = 'minilm'\n[data.negatives]\ncount = 3\n[losses.cosine]\nweight = 1.0\n"
        "[losses.listwise_kl]\nweight = 0.1\nstudent_scale = 20.0\n",
        teacher,
        data,
        tmp_path,
    )
    run = Run(chosen, tmp_path / "out", tmp_path / "cache")
    assert [line.split()[0] for line in finished(run).splitlines()] == [
        "lessons",
        "vectors",
        "scores",
        "train",
        "export",
    ]
    student = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu")
    read = student.tokenizer(["zip tar file 7"])
    feed = {name: np.array(read[name], np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model" / "onnx" / "model.onnx")
    pooled = session.run(None, feed)[0].mean(axis=1)
    expected = student.encode(["zip tar file 7"])
    np.testing.assert_allclose(pooled / np.linalg.norm(pooled), expected, atol=1e-5)
    described = json.loads((tmp_path / "out" / "model" / "distillation.json").read_text())
    assert described["lessons"]["sources"][0]["name"] == "words" and described["files"]["cosine_mean"] > 0.9
    stamp = (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns
    finished(run)
    assert (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    compressed = chosen.model_copy(update={"compress": chosen.compress.model_copy(update={"scheme": "int4"})})
    finished(Run(compressed, tmp_path / "out", tmp_path / "cache"))
    assert (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    assert np.isfinite(np.load(tmp_path / "out" / "vectors.npy")).all(), "listed passages are read"
    trained = chosen.model_copy(update={"seed": 1})
    finished(Run(trained, tmp_path / "out", tmp_path / "cache"))
    assert (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns != stamp


def test_a_pruned_student_learns_from_itself_as_it_was_before(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against steps that all learn from the first teacher, or from the student that is being trained."""
    chosen = recipe(
        "documents = 'minilm'\n[data.negatives]\ncount = 3\n[losses.cosine]\nweight = 1.0\n[losses.listwise_kl]\n"
        "weight = 0.1\nstudent_scale = 20.0\n[pruning]\nneurons = 0.75\nsteps = 2\nteacher = 'pruned'\n",
        teacher,
        data,
        tmp_path,
    )
    out, changed = tmp_path / "out", {"pruning": {**chosen.pruning.model_dump(), "teacher": "original"}}
    finished(Run(chosen, out, tmp_path / "cache"))
    lessons = Lessons.open(out / "lessons")
    told = [np.load(out / "training" / f"pruned-{step}" / "vectors.npy") for step in (0, 1)]
    first, rows = np.load(out / "vectors.npy"), lessons.rows("query")
    for before, after in itertools.pairwise([first, *told]):
        assert (np.abs(before[rows] - after[rows]).max(1) > 1e-3).all(), "each step is told anew"
        np.testing.assert_array_equal(before[lessons.rows("passage")], after[lessons.rows("passage")])
    student = SentenceTransformer(str(out / "student"), device="cpu")
    assert bert_of(student).config.intermediate_size == 16
    finished(Run(Recipe.model_validate({**chosen.model_dump(), **changed}), tmp_path / "original", tmp_path / "cache"))
    assert not (tmp_path / "original" / "training" / "pruned-1" / "vectors.npy").exists()
    shutil.rmtree(out / "student")
    (out / "training" / "pruned-1" / "learned.pt").unlink()
    stamp = out / ".stages" / "train.json"
    stamp.write_text(stamp.read_text().replace('"done": true', '"done": false'))
    learned, learn = list[Path](), Curriculum.learn

    def counted(self: Curriculum, student: Student, folder: Path, **options: Any) -> None:
        learned.append(folder)
        learn(self, student, folder, **options)

    monkeypatch.setattr(Curriculum, "learn", counted)
    finished(Run(chosen, out, tmp_path / "cache"))  # interrupted in its last phase, which alone is learned again
    assert learned == [out / "training" / "pruned-1"]
    again = SentenceTransformer(str(out / "student"), device="cpu")
    np.testing.assert_array_equal(again.encode(WORDS), student.encode(WORDS))


TAUGHT_FIRST = (
    "begins = 'cross'\nscorers = ['cross']\n[teachers.cross]\nkind = 'cross-encoder'\nmodel = 'taught'\n"
    "[teach]\nmodel = '{}'\nepochs = 1\n[student]\nkind = 'reranker'\n"
    "[data.negatives]\ncount = 2\n[losses.margin_mse]\nweight = 1.0\n"
)


def test_a_cross_encoder_is_taught_first_and_becomes_a_reranker(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against a student that learns from a head that nobody trained."""
    chosen = recipe(TAUGHT_FIRST.format(teacher), teacher, data, tmp_path).model_copy()
    run = Run(chosen, tmp_path / "out", tmp_path / "cache")
    said = finished(run)
    assert [line.split()[0] for line in said.splitlines()] == ["lessons", "teach", "scores", "train", "export"]
    student = load_student(tmp_path / "out" / "model", chosen)
    assert isinstance(student, CrossEncoder) and (tmp_path / "out" / "model" / "reranker.json").exists()
    scores = np.load(tmp_path / "out" / "scores.npy")
    lessons = Lessons.open(tmp_path / "out" / "lessons")
    assert scores.shape == (lessons.lists, 3) and np.isfinite(scores).all()


_SEVERAL = """
import sys
import tempfile
from pathlib import Path
import pytest
from tests.server.distillery.test_recipes import ALIGNED, TAUGHT_FIRST, finished, recipe
from stillroom_server.distillery.run import Run
from stillroom_shared.errors import SettingsError

teacher, data, done, out = map(Path, sys.argv[1:])
texts = {"teach": TAUGHT_FIRST.format(teacher), "search": "searches = true\\n" + ALIGNED}
chosen = {stage: recipe(text, teacher, data, Path(tempfile.mkdtemp())) for stage, text in texts.items()}
for stage, one in chosen.items():
    with pytest.raises(SettingsError, match=f"2 processes, and {stage} can only be done by one: run the recipe in one"):
        finished(Run(one, out, out))
    assert not out.exists()
finished(Run(chosen["teach"], done, done))
"""


def test_processes_do_not_wait_for_a_stage_that_one_must_do(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against a trainer of one process that waits for steps of others for ever, and a refusal of what it has done."""
    done, chosen = tmp_path / "done", recipe(TAUGHT_FIRST.format(teacher), teacher, data, tmp_path)
    progress = Progress({name: STAGES[name] for name in planned(chosen)}, console=Console(quiet=True))
    Run(chosen, done, done).all_stages(progress, last="teach")
    assert not (done / "scores.npy").exists()
    in_two_processes(_SEVERAL, tmp_path, teacher, data, done, tmp_path / "out")
    assert (done / "model" / "reranker.json").exists()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_reranker_is_pruned_by_what_its_pairs_say(tmp_path: Path, teacher: Path, data: Path, scale: float) -> None:
    """Guards against importance of pairs that is measured on queries alone, and a criterion that fails after training."""
    text = (
        "[student]\nkind = 'reranker'\n[data.negatives]\ncount = 2\n[pruning]\nneurons = 0.5\ncriterion = 'taylor'\n"
        f"texts = 10\n[losses.margin_mse]\nweight = 1.0\nstudent_scale = {scale}\n"
    )
    run = Run(recipe(text, teacher, data, tmp_path), tmp_path / "out", tmp_path / "cache")
    finished(run)
    pairs, targets = run._measured()
    found, scores = run.lessons, np.load(tmp_path / "out" / "scores.npy")
    places = [divmod(pair, 3) for pair in range(10)]  # of three candidates a list
    rows = [(found.queries[number], found.passages[number, place]) for number, place in places]
    assert pairs == [tuple(found.texts(row)) for row in rows]
    np.testing.assert_allclose(np.asarray(targets), [scores[place] / scale for place in places], rtol=1e-6)
    student = load_student(tmp_path / "out" / "student", run.recipe)
    assert isinstance(student, CrossEncoder) and bert_of(student).config.intermediate_size == 32


ALIGNED = "documents = 'minilm'\n[data.negatives]\ncount = 3\n[losses.cosine]\nweight = 1.0\n"


@pytest.mark.parametrize("changed", ["data", "teacher"])
def test_what_a_named_folder_holds_is_looked_at_again(tmp_path: Path, teacher: Path, data: Path, changed: str) -> None:
    """Guards against a model of yesterday's text, or of a teacher that has been trained since."""
    folders = {"data": shutil.copytree(data, tmp_path / "data"), "teacher": shutil.copytree(teacher, tmp_path / "own")}
    chosen = recipe(ALIGNED, folders["teacher"], folders["data"], tmp_path)
    finished(Run(chosen, tmp_path / "out", tmp_path / "cache"))
    before = np.load(tmp_path / "out" / "vectors.npy")
    if changed == "data":
        with (folders["data"] / "corpus.jsonl").open("a") as corpus:
            corpus.write(json.dumps({"_id": "new", "text": "A tapir eats leaves."}) + "\n")
    else:
        weights = load_file(folders["teacher"] / "model.safetensors")
        save_file({name: value * 1.5 for name, value in weights.items()}, folders["teacher"] / "model.safetensors")
    finished(Run(chosen, tmp_path / "out", tmp_path / "cache"))
    after = np.load(tmp_path / "out" / "vectors.npy")
    assert len(after) == len(before) + (changed == "data")
    assert changed == "data" or not np.array_equal(after, before)


def test_passages_are_embedded_when_a_loss_begins_to_read_them(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against hours spent on vectors that nothing reads, and against their absence under a recipe that does."""
    chosen = recipe(ALIGNED, teacher, data, tmp_path)
    finished(Run(chosen, tmp_path / "out", tmp_path / "cache"))
    lessons = Lessons.open(tmp_path / "out" / "lessons")
    before = np.load(tmp_path / "out" / "vectors.npy")
    assert np.isfinite(before[lessons.rows("query")]).all() and np.isnan(before[lessons.rows("passage")]).all()
    listed = chosen.model_copy(
        update={"losses": LossesSettings.model_validate({"cosine": {"weight": 1}, "contrastive": {"weight": 1}})}
    )
    finished(Run(listed, tmp_path / "out", tmp_path / "cache"))
    assert np.isfinite(np.load(tmp_path / "out" / "vectors.npy")).all()


def test_what_another_recipe_left_in_the_folder_is_not_learned_from(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against vectors and scores of other lessons, in the place of signals that this recipe lacks."""
    finished(Run(recipe(ALIGNED, teacher, data, tmp_path), tmp_path / "out", tmp_path / "cache"))
    own = ALIGNED.replace("documents = 'minilm'", "training.towers = 'both'")
    run = Run(recipe(own, teacher, data, tmp_path), tmp_path / "out", tmp_path / "cache")
    assert run._curriculum.bank.vectors is None and run._curriculum.bank.scores is None
    with pytest.raises(SettingsError, match="cosine needs teacher_queries"):
        run._train(Stage(lambda fraction: None))


ROTATED = (
    "rotate = true\ndocuments = 'minilm'\n[data.negatives]\ncount = 0\n[training]\nranked = 'corpus'\n"
    "[losses.cosine]\nweight = 1.0\n[losses.listwise_kl]\nweight = 0.1\ntemperature = 0.05\n[losses.matryoshka]\ndims = [8]\n"
)


def test_a_rotated_space_has_a_document_tower_of_its_own(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against a student that learns the teacher's space, a tower that gives another, and a folder without it."""
    chosen = recipe(ROTATED, teacher, data, tmp_path)
    whole = chosen.student.model_copy(update={"layers": (0, 1)})  # so that it begins where the teacher is
    run = Run(chosen.model_copy(update={"student": whole}), tmp_path / "out", tmp_path / "cache")
    said = finished(run).splitlines()
    assert [line.split()[0] for line in said] == ["lessons", "vectors", "rotate", "train", "export"]
    vectors, rotated = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("vectors", "rotated"))
    assert rotated.dtype == vectors.dtype == np.float16
    rows = run.lessons.rows("passage")
    tower = SentenceTransformer(str(tmp_path / "out" / "model" / "documents"), device="cpu")
    np.testing.assert_allclose(tower.encode_document(run.lessons.texts(rows)), rotated[rows], atol=2e-3)
    assert np.abs(vectors.astype(np.float32) - rotated).max() > 0.1, "the guard: it is turned"
    pairs, turned = (one.astype(np.float32) @ one.astype(np.float32).T for one in (vectors, rotated))
    np.testing.assert_allclose(pairs, turned, atol=2e-3)
    described = json.loads((tmp_path / "out" / "model" / "distillation.json").read_text())
    share = float(np.square(rotated[:, :8].astype(np.float64)).sum() / len(rotated))
    assert described["rotation"]["share_of_squared_length"] == {"8": pytest.approx(share, abs=1e-3)}
    assert f"squared length: {share:.0%} in 8" in said[2]
    student = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu")
    queries = run.lessons.rows("query")
    cosines = np.einsum("nd,nd->n", student.encode(run.lessons.texts(queries)), rotated[queries])
    assert cosines.mean() > 0.9, "the student lies in the rotated space"


@pytest.mark.parametrize("least", [1, 2])
def test_a_rotation_of_too_few_texts_says_that_they_were_not_ranked(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Guards against directions that were to rank, and silently do not."""
    monkeypatch.setattr(rotation, "_LEAST_RANKED", least)
    chosen = recipe("rotate = true\n" + ALIGNED + "[losses.matryoshka]\ndims = [8]\n", teacher, data, tmp_path)
    run, console = Run(chosen, tmp_path / "out", tmp_path / "cache"), Console(record=True, width=160)
    run.all_stages(Progress({name: STAGES[name] for name in planned(chosen)}, console=console), last="rotate")
    said = console.export_text()
    assert ("principal directions: 64 texts could be ranked, 40 cannot" in said) == (least == 2)
    plain = Rotation.of(np.load(tmp_path / "out" / "vectors.npy")).directions
    assert np.array_equal(Rotation.open(tmp_path / "out" / "rotation.npz").directions, plain) == (least == 2)


def test_only_what_depends_on_the_rotation_is_made_again(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against vectors that are computed twice, and a student of the one space beside documents of the other."""
    chosen = recipe(ALIGNED, teacher, data, tmp_path)
    out = tmp_path / "out"

    def made(one: Recipe) -> dict[str, int]:
        finished(Run(one, out, tmp_path / "cache"))
        names = ("lessons/texts.arrow", "vectors.npy", "rotated.npy", "student/model.safetensors")
        return {name: (out / name).stat().st_mtime_ns for name in names if (out / name).exists()}

    plain = made(chosen)
    rotated = made(chosen.model_copy(update={"rotate": True}))
    assert rotated.pop("rotated.npy") and (out / "model" / "documents").is_dir()
    assert {name for name in plain if plain[name] != rotated[name]} == {"student/model.safetensors"}
    again = made(chosen.model_copy(update={"rotate": True}))
    assert again.pop("rotated.npy") and again == rotated
    back = made(chosen)
    back.pop("rotated.npy")  # stays, and is not read
    assert {name for name in back if back[name] != again[name]} >= {"student/model.safetensors"}
    assert back["vectors.npy"] == plain["vectors.npy"]
    assert not (out / "model" / "documents").exists()
    assert "rotat" not in (out / "model" / "distillation.json").read_text()


def test_token_vectors_are_learned_in_the_rotated_space(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against two losses that pull into two spaces, and against tokens of a teacher that is no longer named."""
    text = ROTATED.replace("[losses.matryoshka]\ndims = [8]\n", "[losses.token_pooling]\nweight = 1.0\n")
    chosen = recipe(text, teacher, data, tmp_path)
    run = Run(chosen, tmp_path / "out", tmp_path / "cache")
    finished(run)
    curriculum, rows = run._curriculum, run.lessons.rows("query")
    assert curriculum.tokens is not None and curriculum.bank.vectors is not None
    pooled = np.array([one.numpy().mean(0) for one in curriculum.tokens.encode_query(run.lessons.texts(rows))])
    targets = curriculum.bank.vectors[rows].astype(np.float32)
    cosines = np.einsum("nd,nd->n", pooled, targets) / np.linalg.norm(pooled, axis=1)
    assert cosines.mean() > 0.9, "pooled tokens lie where the vectors do"
    late = chosen.model_copy(
        update={"teachers": {**chosen.teachers, "late": TeacherSettings(kind="late-interaction", model=str(teacher))}}
    )
    assert (chosen.token_teacher, late.token_teacher) == ("minilm", "late")
    only = late.model_copy(update={"scorers": ("minilm",)})
    assert stage_keys(only)["train"] != stage_keys(late)["train"]


LISTED = "documents = 'minilm'\n[losses.listwise_kl]\nweight = 1.0\n"
LAYERED = "documents = 'minilm'\n[losses.hidden_states]\nweight = 1.0\n"
CORPUS = "[training]\nranked = 'corpus'\n"
NARROW = "[student]\ndimension = 8\n"
TOKENS = "documents = 'minilm'\n[losses.token_pooling]\nweight = 1.0\n"
TAYLOR = "[pruning]\nheads = 0.5\ncriterion = 'taylor'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIGNED + "[losses.matryoshka]\ndims = [8, 32]\n", "give lengths below 32"),
        (ALIGNED.replace("documents = 'minilm'", "training.towers = 'both'"), "cosine needs teacher_queries"),
        ("[losses.cosine]\nweight = 1.0\n[training]\ntowers = 'query'\n", "cosine needs teacher_queries"),
        (LISTED + "[data.negatives]\ncount = 0\n", "listwise_kl compares candidates, and lists have 1"),
        (LISTED.replace("documents = 'minilm'\n", ""), "passages need vectors that stay"),
        (
            LISTED + NARROW,
            "vectors have 8 values, and passages keep those of `documents`, which have 32: set student.dim",
        ),
        (LISTED + NARROW + CORPUS, "vectors have 8 values, and passages keep"),
        (LISTED + NARROW + "[training]\ntowers = 'both'\n", ""),
        (ALIGNED + NARROW, ""),
        (ALIGNED + CORPUS + "[losses.margin_mse]\nweight = 1.0\n", "corpus, and margin_mse takes the first passage"),
        (
            ALIGNED + CORPUS + "[losses.margin_hinge]\nweight = 1.0\n",
            "margin_hinge takes the first .*: set it to listed",
        ),
        (
            ALIGNED + CORPUS + "[losses.contrastive]\nweight = 1.0\nin_batch = true\n",
            "corpus, where all queries have the same",
        ),
        (ALIGNED + CORPUS + "[losses.soft_hard]\nweight = 1.0\n[losses.contrastive]\nweight = 1.0\n", ""),
        ("searches = true\n" + ALIGNED + NARROW, "student.dimension is 8, and a search ranks .* of 32 values"),
        (LISTED + "[training]\ntowers = 'both'\nranked = 'corpus'\n", "set training.towers to query"),
        (LAYERED.replace("documents = 'minilm'\n", ""), "with a bi-encoder's: name it as `documents`"),
        (LAYERED + "layer_map = [0, 9]\n", "hidden_states.layer_map"),
        (LAYERED + "[student]\nkind = 'static'\n", "the student has none"),
        (LAYERED + "[student]\nvocabulary = 20\n", "their vocabularies differ"),
        (TOKENS + "[student]\nvocabulary = 20\n", "their vocabularies differ"),
        (TOKENS.replace("token_pooling", "token_alignment"), "token_alignment needs student_tokens"),
        (
            "begins = 'cross'\nscorers = ['cross']\n[teachers.cross]\nkind = 'cross-encoder'\nmodel = 'taught'\n"
            "[student]\nkind = 'late-interaction'\n[losses.token_alignment]\nweight = 1.0\n",
            "needs teacher_tokens, which this recipe does not provide",
        ),
        (
            "begins = 'late'\n[teachers.late]\nkind = 'late-interaction'\n" + ALIGNED,
            "begins from a bi-encoder, and 'late'",
        ),
        (ALIGNED + TAYLOR, ""),
        (
            "[student]\nkind = 'reranker'\n[losses.margin_hinge]\nweight = 1.0\n" + TAYLOR,
            "taylor, which needs a teacher's scores, and no loss of this reranker reads any",
        ),
        ("[student]\nkind = 'reranker'\n[losses.margin_mse]\nweight = 1.0\n" + TAYLOR, ""),
        (
            "[student]\nkind = 'reranker'\n[losses.margin_mse]\nweight = 1.0\n[losses.listwise_kl]\nweight = 1.0\n"
            "student_scale = 20.0\n" + TAYLOR,
            "taylor, which needs scores at one scale, and losses have student_scale 1, 20",
        ),
        (
            "[student]\nkind = 'late-interaction'\ntoken_dimension = 8\npassage_tokens = 40\n"
            "[losses.margin_mse]\nweight = 1.0\n" + TAYLOR,
            "taylor, .* a late-interaction student has neither",
        ),
        (
            "[training]\ntowers = 'both'\n[losses.margin_mse]\nweight = 1.0\n" + TAYLOR,
            "taylor, which needs a teacher's vectors",
        ),
        (
            LISTED + "[training]\ntowers = 'both'\n[student]\ndimension = 16\n" + TAYLOR,
            "the student's have 16 values, those of `documents` 32",
        ),
        (ALIGNED + "[student]\nkind = 'static'\ndimension = 33\n", "dimension 33 is above the teacher's 32"),
        (ALIGNED + "[student]\nkind = 'static'\n[pruning]\nneurons = 0.5\n", "a static student has none"),
        (ALIGNED + "[student]\nkind = 'static'\n[pruning]\nweights = 0.5\n", "a static student has none"),
        (ALIGNED + "[student]\ninit = 'scratch'\nwidth = 48\n", "width 48 is above the teacher's 32"),
        (
            ALIGNED + "[student]\ninit = 'scratch'\nwidth = 48\nembeddings = 'random'\nfreeze_embeddings = false\n",
            "",
        ),
        (
            "[student]\nkind = 'late-interaction'\ntoken_dimension = 33\n[losses.margin_mse]\nweight = 1.0\n",
            "token_dimension 33 is above the tower's width 32",
        ),
        (ALIGNED + "[student]\nkind = 'static'\n[training]\nquantized = true\n", "a static student has none"),
    ],
)
def test_what_would_fail_when_the_student_is_trained_is_refused_first(
    tmp_path: Path, teacher: Path, data: Path, text: str, words: str
) -> None:
    """Guards against hours of teachers' work for a student that cannot learn; a case without words is one that can."""
    if text.startswith("begins = 'late'"):
        text = "documents = 'minilm'\n" + text.replace("documents = 'minilm'\n", "")
    run = Run(recipe(text, teacher, data, tmp_path), tmp_path / "out", tmp_path / "cache")
    if not words:
        refuse_early(run.recipe)
        return
    with pytest.raises(SettingsError, match=words):
        finished(run)
    assert not run.out.exists() and not run.cache.exists()


@pytest.mark.parametrize("changed", ["roberta", "shallow", "wide", "short"])
def test_files_of_a_teacher_say_what_it_is_without_its_weights(
    tmp_path: Path, teacher: Path, data: Path, changed: str
) -> None:
    """Guards against sizes that are taken from somewhere else, and a check that has to load what it checks."""
    own = shutil.copytree(teacher, tmp_path / "own")
    (own / "model.safetensors").unlink()
    chosen = recipe(LAYERED + "[losses.matryoshka]\ndims = [8]\n[losses.cosine]\nweight = 1.0\n", own, data, tmp_path)
    refuse_early(chosen)
    config = json.loads((own / "config.json").read_text())
    changes, words = {
        "roberta": ({"model_type": "roberta"}, "'minilm' is a roberta: students are made of BERT towers only"),
        "shallow": ({"num_hidden_layers": 0}, "student.layers"),
        "wide": ({"hidden_size": 8}, "give lengths below 8"),
        "short": ({"max_position_embeddings": 15}, "tokens 16: the teacher knows 15 positions"),
    }[changed]
    (own / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SettingsError, match=words):
        refuse_early(chosen)


def test_a_size_that_no_file_says_refuses_nothing(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Guards against a guessed length of vectors that another length is compared with."""
    (own := shutil.copytree(teacher, tmp_path / "own") / "config.json").unlink()
    refuse_early(recipe(LISTED + NARROW, own.parent, data, tmp_path))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_no_ready_recipe_is_refused(name: str) -> None:
    """Guards against a check that is stricter than training."""
    refuse_early(load_recipe(name, {}))


def test_guesses_follow_what_the_lessons_hold(tmp_path: Path) -> None:
    """Guards against ten minutes that are told for a run of ten seconds, and against a number for what nobody counted."""
    found = lessons(tmp_path / "lessons", queries=40, lists=20)  # three candidates each, thirty passages
    text = LossesSettings.model_validate({"cosine": {"weight": 1}})
    listed = LossesSettings.model_validate({"cosine": {"weight": 1}, "margin_mse": {"weight": 1}})
    alone = Recipe(teachers={"one": TeacherSettings()}, documents="one", losses=text)
    both = alone.model_copy(update={"losses": listed})
    twice = both.model_copy(update={"teachers": {**both.teachers, "two": TeacherSettings()}})
    of = {name: expected(one, found) for name, one in (("alone", alone), ("both", both), ("twice", twice))}

    def ratio(left: str, right: str, stage: str) -> float:
        return float(of[left][stage] or 0) / float(of[right][stage] or 1)

    assert ratio("both", "alone", "vectors") == pytest.approx(70 / 40)
    assert ratio("both", "alone", "train") == pytest.approx(60 / 40)
    assert ratio("twice", "both", "scores") == pytest.approx(2)
    more = both.model_copy(update={"training": both.training.model_copy(update={"epochs": 6.0, "towers": "both"})})
    assert float(expected(more, found)["train"] or 0) / float(of["both"]["train"] or 1) == pytest.approx(
        (70 + 20 * 4) * 6 / (60 * 3)
    )
    assert "search" not in of["both"] and STAGES["search"] is None
