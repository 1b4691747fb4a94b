"""Teaching: a cross-encoder learns from labelled lists, resumes where it was, and is measured on lists it did not see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from sentence_transformers import CrossEncoder
from tests.server.distillery.tiny_models import save_models
from transformers import BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_server.distillery.cli import register
from stillroom_server.distillery.lessons import Lessons, LessonsWriter
from stillroom_server.distillery.teachers.opening import open_teacher
from stillroom_server.distillery.teachers.settings import TeacherSettings
from stillroom_server.distillery.teaching import Teaching, TeachSettings, teach
from stillroom_server.distillery.teaching_lists import pick_lists, training_rows, validation_samples
from stillroom_shared.errors import DataError, SettingsError

WORDS = ["zip", "tar", "file", "list", "sort", "index", "passage", "query", "leaves", "river", "bank", "number"]


def write_lessons(folder: Path, lists: int = 90, candidates: int = 4) -> Lessons:
    """Relevant is who speaks of tapirs, whatever the query: a random tower of two layers can learn that."""
    generator = np.random.default_rng(0)
    with LessonsWriter(folder, candidates=candidates) as writer:
        source = writer.source("words", licence="CC0")
        for number in range(lists):
            words = ["tapir", *generator.choice(WORDS, candidates - 1)]
            texts = [f"{word} {generator.choice(WORDS)} {number}" for word in words]
            order = generator.permutation(candidates)
            rows = writer.texts([texts[place] for place in order], "passage", source)
            query = writer.text(f"{generator.choice(WORDS)} {number}", "query", source)
            writer.list(query, rows, [int(place == 0) for place in order], source)
    return Lessons.open(folder)


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    return write_lessons(tmp_path_factory.mktemp("data") / "lessons")


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> TeachSettings:
    folders = save_models(tmp_path_factory.mktemp("tiny"), tiny_towers[1], tiny_tokenizer)
    return TeachSettings(
        model=folders["bi-encoder"], candidates=4, epochs=1, batch_size=32, learning_rate=2e-3, held_out=0.2,
        checkpoints=3, pair_tokens=24, device="cpu",
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(CrossEncoder(str(folder), device="cpu").state_dict())


def test_it_learns_and_is_saved_as_any_cross_encoder(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """A head that stays random is saved without an error, and so is one that learned from labels of other passages."""
    seen: list[tuple[int, int]] = []
    longer = settings.model_copy(update={"epochs": 6.0, "checkpoints": 2})
    done = teach(lessons, longer, tmp_path / "taught", lambda step, of: seen.append((step, of)))
    assert done.after > max(0.9, done.before + 0.1) and done.lists + done.held_out == lessons.lists
    assert seen == [(step, done.steps) for step in range(1, done.steps + 1)]
    facts = json.loads((tmp_path / "taught/teaching.json").read_text())
    assert facts["sources"] == {"words": {"licence": "CC0"}} and facts["lessons"] == lessons.identity
    teacher = open_teacher(TeacherSettings(kind="cross-encoder", model=str(tmp_path / "taught"), device="cpu"))
    [scores] = teacher.score(["tapir 1"], [["river sort 1", "tapir sort 1", "bank sort 1"]])
    assert int(scores.argmax()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taught"]
    assert not (tmp_path / "taught/README.md").exists()
    assert teach(lessons, longer, tmp_path / "taught", lambda step, of: pytest.fail("trained again")) == done
    with pytest.raises(SettingsError, match="is not of these lessons and settings"):
        teach(lessons, settings, tmp_path / "taught")


def interrupted_at(number: int) -> Callable[[int, int], None]:
    def progress(step: int, of: int) -> None:
        if step == number:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    loss: str, lessons: Lessons, settings: TeachSettings, tmp_path: Path
) -> None:
    """A resume that forgets the optimizer, the schedule, the order or dropout's state trains another model."""
    settings = settings.model_copy(update={"loss": loss})
    whole = teach(lessons, settings, tmp_path / "whole")
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        teach(lessons, settings, tmp_path / "resumed", interrupted_at(2 * whole.steps // 3 + 1))
    assert not (tmp_path / "resumed").exists()
    torch.manual_seed(99)
    resumed = teach(lessons, settings, tmp_path / "resumed", lambda step, of: steps.append(step))
    assert 1 < steps[0] <= 2 * whole.steps // 3 + 1 and steps[-1] == whole.steps  # it did not begin anew
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    first, second = weights(whole.folder), weights(resumed.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("autocast", [False, True])
def test_less_padding_computes_the_same(
    settings: TeachSettings, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores in the order of lengths teach each pair another's label; padding that is not left out wastes the time."""
    from stillroom_server.distillery.training import padding

    monkeypatch.setattr(padding, "PART", 4)
    model = CrossEncoder(settings.model, num_labels=1, device="cpu")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    pairs = [("zip file", "tapir " * (7 * number % 11)) for number in range(11)]
    features, seen = model.preprocess(pairs), list[tuple[int, ...]]()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = model(dict(features))["scores"].view(-1).float()
        (scores * torch.arange(11)).sum().backward()
        return scores.detach(), torch.cat([one.grad.ravel() for one in model.parameters() if one.grad is not None])

    whole, slopes = step()
    watching = model[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0]["input_ids"].shape)))
    with padding.less_padding(model):
        parts, other = step()
        tolerance = 0.05 if autocast else 1e-5
        torch.testing.assert_close(parts, whole, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(other, slopes, atol=tolerance * float(slopes.abs().max()), rtol=tolerance)
        assert [rows for rows, _ in seen] == [4, 4, 3] and len({columns for _, columns in seen}) == 3
        model.eval()
        assert model(dict(features))["scores"].shape == (11, 1) and len(seen) == 4
    watching.remove()
    assert "forward" not in vars(model)


def test_work_of_other_settings_is_not_resumed(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """Half a run at one learning rate and half at another passes for the second."""
    with pytest.raises(KeyboardInterrupt):
        teach(lessons, settings, tmp_path / "out", interrupted_at(8))
    steps: list[int] = []
    other = settings.model_copy(update={"learning_rate": 1e-3})
    teach(lessons, other, tmp_path / "out", lambda step, of: steps.append(step))
    assert steps[0] == 1


def test_a_checkpoint_that_a_kill_left_unfinished_is_not_resumed_from(
    lessons: Lessons, settings: TeachSettings, tmp_path: Path
) -> None:
    """A run that was killed while it saved could never be resumed."""
    whole = teach(lessons, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        teach(lessons, settings, tmp_path / "killed", interrupted_at(whole.steps - 1))
    saved = sorted((tmp_path / ".killed.teaching").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = saved[-1] / "trainer_state.json"
    state.write_text(state.read_text()[:99])
    teach(lessons, settings, tmp_path / "killed")
    first, second = weights(whole.folder), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_base_model_that_was_saved_anew_is_another(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """Half a run from weights that are gone, or their result, passes for one from what lies there now."""
    base = shutil.copytree(settings.model, tmp_path / "base")
    settings = settings.model_copy(update={"model": str(base)})
    with pytest.raises(KeyboardInterrupt):
        teach(lessons, settings, tmp_path / "out", interrupted_at(8))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    steps: list[int] = []
    teach(lessons, settings, tmp_path / "out", lambda step, of: steps.append(step))
    assert steps[0] == 1
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="not of these lessons and settings"):
        teach(lessons, settings, tmp_path / "out")


def test_no_query_is_trained_on_and_measured(lessons: Lessons, tmp_path: Path) -> None:
    """A held-out list whose query is also trained on measures memory."""
    with LessonsWriter(tmp_path / "twice", candidates=2) as writer:
        source = writer.source("zoo")
        good, bad = writer.texts(["a", "b"], "passage", source)
        for number in range(80):
            query = writer.text(f"Query {number // 2}" if number % 2 else f"query  {number // 2}", "query", source)
            writer.list(query, [good, bad], [1, 0], source)
        writer.list(query, [good, bad], [1, 1], source)
        writer.list(query, [good, bad], [0, 0], source)
    twice = Lessons.open(tmp_path / "twice")
    picked = pick_lists(twice, 0.3, 100, None, 0)
    trained, held = (twice.texts(twice.queries[part]) for part in (picked.trained, picked.held_out))
    assert (
        not {text.split()[1] for text in trained} & {text.split()[1] for text in held}
        and 10 < len(picked.held_out) < 50
    )
    assert sorted([*picked.trained, *picked.held_out]) == list(range(80))
    assert len(pick_lists(twice, 0.3, 7, 9, 0).held_out) == 7 and len(pick_lists(twice, 0.3, 7, 9, 0).trained) == 9
    smaller = pick_lists(lessons, 0.3, 100, None, 1)
    assert set(pick_lists(lessons, 0.1, 100, None, 0).held_out) < set(smaller.held_out)
    with pytest.raises(DataError, match="change held_out"):
        pick_lists(twice, 1e-9, 100, None, 0)


def test_rows_are_what_the_losses_take(lessons: Lessons, tmp_path: Path) -> None:
    """Labels beside other passages; a list of relevant passages only, which has nothing to tell apart."""
    with LessonsWriter(tmp_path / "graded", candidates=5) as writer:
        source = writer.source("zoo")
        rows = writer.texts(list("abcde"), "passage", source)
        writer.list(writer.text("q", "query", source), rows, [0, 2, 0, 1, 3], source)
    graded = Lessons.open(tmp_path / "graded")
    only = np.array([0])
    from datasets import Dataset

    path, pairs, _ = training_rows(graded, only, "softmax", 3, tmp_path)
    assert pairs == 3
    assert Dataset.from_file(str(path))[0] == {"query": "q", "passages": ["b", "d", "a"], "label": [100.0, 50.0, 0.0]}
    path, pairs, irrelevant = training_rows(graded, only, "binary", 4, tmp_path)
    rows_of = [tuple(row.values()) for row in Dataset.from_file(str(path))]
    assert rows_of == [("q", "b", 1.0), ("q", "d", 1.0), ("q", "e", 1.0), ("q", "a", 0.0)]
    assert pairs == 1 and irrelevant == pytest.approx(1 / 3)
    assert validation_samples(graded, only) == [{"query": "q", "positive": ["b", "d", "e"], "negative": ["a", "c"]}]


def test_what_cannot_be_taught_is_refused(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """A learning rate that blows up saves weights that are not numbers."""
    with pytest.raises(SettingsError, match="cannot be loaded"):
        teach(lessons, settings.model_copy(update={"model": str(tmp_path / "absent")}), tmp_path / "out")
    with pytest.raises(DataError, match="lower learning_rate"):
        teach(lessons, settings.model_copy(update={"learning_rate": 1e30}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lambda_loss_runs(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """A loss that no test has run."""
    done = teach(lessons, settings.model_copy(update={"loss": "lambda"}), tmp_path / "out")
    assert isinstance(done, Teaching) and 0 < done.after <= 1


def test_the_command_teaches(lessons: Lessons, settings: TeachSettings, tmp_path: Path) -> None:
    """Options that do not reach the trainer, or figures that are not printed."""
    (tmp_path / "teach.toml").write_text('loss = "lambda"\nbatch_size = 64\ndevice = "cpu"\n')
    changes = [f"model={settings.model}", "batch_size=16", "held_out=0.2", "learning_rate=1e-3", "most_lists=20"]
    app = typer.Typer()
    register(app)
    arguments = [
        "--lessons",
        str(lessons.folder),
        "--out",
        str(tmp_path / "out"),
        "--settings",
        str(tmp_path / "teach.toml"),
    ]
    result = CliRunner().invoke(
        app, ["distill", "teach", *arguments, *(word for one in changes for word in ("--set", one))]
    )
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out/teaching.json").read_text())
    assert facts["settings"]["loss"] == "lambda" and facts["settings"]["batch_size"] == 16
    assert f"{facts['result']['after']:.3f} after" in result.output and facts["result"]["lists"] == 20


def write_beir(folder: Path, queries: int, first: int) -> Path:
    """Each query has a passage of its number that speaks of tapirs; the last two are for choosing and for testing."""
    (folder / "qrels").mkdir(parents=True)
    asked, read, judged = [], [], {"train": list[str](), "dev": list[str](), "test": list[str]()}
    splits = {first + queries - 1: "test", first + queries - 2: "dev"}
    for number in range(first, first + queries):
        word = WORDS[number % len(WORDS)]
        asked.append(json.dumps({"_id": f"q{number}", "text": f"{word} {number}"}))
        read.append(json.dumps({"_id": f"p{number}", "text": f"tapir {word} {number}"}))
        read.append(json.dumps({"_id": f"n{number}", "text": f"river {word} {number} bank"}))
        judged[splits.get(number, "train")].append(f"q{number}\tp{number}\t1")
    (folder / "queries.jsonl").write_text("\n".join(asked) + "\n")
    (folder / "corpus.jsonl").write_text("\n".join(read) + "\n")
    for split, lines in judged.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_command_prepares_what_it_teaches(settings: TeachSettings, tmp_path: Path) -> None:
    """Test queries among the lessons, a second folder that is dropped, or a run that prepares everything again."""
    folders = [write_beir(tmp_path / "zoo", 40, 0), write_beir(tmp_path / "park", 20, 50)]
    app = typer.Typer()
    register(app)
    out = tmp_path / "taught"
    changes = (f"model={settings.model}", "batch_size=16", "held_out=0.3", "candidates=4", "device=cpu", "epochs=2")
    arguments = [word for folder in folders for word in ("--data", str(folder))]
    arguments += ["--out", str(out), "--miner", settings.model, "--cache", str(tmp_path / "cache")]
    arguments += [word for one in changes for word in ("--set", one)]
    result = CliRunner().invoke(app, ["distill", "teach", *arguments])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[:2]] == ["lessons", "teach"]
    made = Lessons.open(tmp_path / "taught.lessons")
    assert made.lists == 38 + 18 and made.candidates == 4 and set(made.sources) >= {"zoo", "park"}
    trained = set(made.texts(made.queries))
    assert not trained & {f"{WORDS[number % len(WORDS)]} {number}" for number in (38, 39, 68, 69)}
    assert (made.grades == [1, 0, 0, 0]).all()
    stamps = [path.stat().st_mtime_ns for path in (out / "model.safetensors", made.folder / "lists.arrow")]
    again = CliRunner().invoke(app, ["distill", "teach", *arguments])
    assert again.exit_code == 0 and again.output.splitlines()[-1] == result.output.splitlines()[-1]
    assert stamps == [path.stat().st_mtime_ns for path in (out / "model.safetensors", made.folder / "lists.arrow")]
    for wrong in (["--out", str(out)], ["--lessons", str(made.folder), *arguments]):
        refused = CliRunner().invoke(app, ["distill", "teach", *wrong])
        assert isinstance(refused.exception, SettingsError) and "one of them" in str(refused.exception)
