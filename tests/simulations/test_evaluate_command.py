"""`stillroom evaluate`: every kind of model against slow rankings, what is refused, what is kept, what is printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.references import ndcg as reference
from tests.simulations import shelves
from tests.simulations.shelves import PASSAGES, QRELS, QUERIES, Ranker
from transformers import BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_shared.cli import build_app
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Release
from stillroom_simulations.evaluating import sentence_models
from stillroom_simulations.evaluating.kept import Kept
from stillroom_simulations.evaluating.run import Choices, compare, evaluate_models
from stillroom_simulations.evaluating.values import METRICS, Evaluation
from stillroom_simulations.evaluating.words import Words

QUICK = Choices(timed=0, resamples=50)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelves.shelf(tmp_path_factory.mktemp("beir") / "zoo")


@pytest.fixture(scope="session")
def bi(
    tmp_path_factory: pytest.TempPathFactory, tiny_towers: tuple[BertModel, BertModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:  # fmt: skip
    return shelves.bi_encoder(tmp_path_factory.mktemp("bi"), tiny_towers[1], tiny_tokenizer)


@pytest.fixture(scope="session")
def cross(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return shelves.cross_encoder(tmp_path_factory.mktemp("cross") / "cross", tiny_tokenizer)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_release: Release, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("homes") / "device"
    with Device.create(folder, tiny_release, link=True) as device:
        device.add(shelves.corpus(data).passages)
    return folder


def check(found: Evaluation, model: str, rankings: Ranker, split: str = "test") -> None:
    """Every metric of every query is that of a slow ranking."""
    scores = found.sets[0].of(model).scores
    assert set(scores.query_ids) == set(QRELS[split])
    for row, query in enumerate(scores.query_ids):
        order, grades = rankings(QUERIES[query]), QRELS[split][query]
        wanted = [
            reference.ndcg(order, grades), reference.recall(order, grades), reference.recall(order, grades, 100),
            reference.reciprocal_rank(order, grades), reference.average_precision(order, grades),
        ]  # fmt: skip
        assert scores.table[row] == pytest.approx(wanted, abs=1e-9), (model, query)


def evaluate(models: list[Any], data: Path, **choices: Any) -> Evaluation:
    made = Choices(**{"timed": 0, "resamples": 50, **choices})
    return evaluate_models(models, [shelves.corpus(data)], made)


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


def test_cross_encoders_read_the_top_of_their_first_stage(data: Path, bi: Path, cross: Path) -> None:
    """A reranker that reads all passages, or loses those it did not read, has another recall than its first stage."""
    for first, label in (("bm25", "bm25"), (str(bi), "model")):
        found = evaluate([first, str(cross)], data, first_stage=first, rerank=3)
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


def slow_first(data: Path, bi: Path | None) -> Ranker:
    """BM25 as the index of words has it, or a bi-encoder."""
    if bi is not None:
        model: Any = sentence_models.load_model(str(bi)).model
        return shelves.dense(model.encode, model.encode)
    passages = shelves.corpus(data).passages
    searcher = Words().index(passages, Kept(None))

    def ranker(text: str) -> list[str]:
        scores, rows = searcher.found.search(text, 100)
        return shelves.ranked(dict(zip([passages[row].id for row in rows], scores.tolist(), strict=True)))

    return ranker


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


def test_splits(data: Path, tmp_path: Path) -> None:
    """Measured on train by mistake, a model looks as good as it remembers."""
    assert evaluate(["bm25"], data).sets[0].split == "test"
    check(evaluate(["bm25"], data, split="dev"), "bm25", slow_first(data, None), "dev")
    rest = shelves.shelf(tmp_path / "rest", splits=("dev", "train"))
    assert evaluate(["bm25"], rest).sets[0].split == "dev"
    with pytest.raises(DataError, match=r"rest has no test split .* --split: train \(1 queries\), dev \(2 queries\)"):
        evaluate(["bm25"], rest, split="test")
    only = shelves.shelf(tmp_path / "only", splits=("train",))
    with pytest.raises(DataError, match="neither a test nor a dev split"):
        evaluate(["bm25"], only)
    (rest / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq5\td01\t0\n")
    with pytest.raises(DataError, match="none of 1 judged queries has a relevant passage"):
        evaluate(["bm25"], rest)


def test_what_cannot_be_evaluated_is_said(
    data: Path, bi: Path, cross: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_release: Release
) -> None:
    """A traceback of a library tells nobody what to do; a model's own code must not run because it was named."""
    several = shelves.cross_encoder(tmp_path / "several", tiny_tokenizer, labels=3)
    remote = tmp_path / "remote"
    remote.mkdir()
    named = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (remote / "config.json").write_text(json.dumps(named))
    (remote / "own.py").write_text("open('ran', 'w')")
    empty = tmp_path / "empty"
    empty.mkdir()
    release = str(tiny_release.folder)
    for models, said in (
        (["no-such-model"], "'no-such-model' is no folder, and no model of that name"),
        ([str(empty)], "holds no model"),
        ([str(remote)], "brings code of its own"),
        ([str(several)], "cross-encoder with 3 outputs"),
        ([f"{cross}::{bi}"], "is a CrossEncoder: a pair is of two bi-encoders"),
        ([f"bm25::{bi}"], "is a bm25 and has no tower"),
        ([f"{bi}@8::{release}"], "query vectors have 8 dimensions and passage vectors 32"),
        ([f"{bi}@64"], "@64: vectors of 32 values"),
        ([f"{bi}@int8"], "@int8 says nothing of a model"),
        ([f"{release}@hybrid"], "@hybrid says nothing of a release"),
        (["bm25", "bm25"], "bm25 is named twice"),
        ([], "at least one model"),
    ):
        with pytest.raises(SettingsError, match=said):
            evaluate(models, data)
    assert not Path("ran").exists()
    with pytest.raises(SettingsError, match="it needs a first stage itself"):
        evaluate([str(cross)], data, first_stage=str(cross))


def test_a_device_without_the_corpus_is_refused(data: Path, tmp_path: Path, tiny_release: Release) -> None:
    """Passages that were never added would count as misses of the search."""
    folder = tmp_path / "device"
    with Device.create(folder, tiny_release, link=True) as device:
        device.add(shelves.corpus(data).passages[:-1])
    with pytest.raises(DataError, match=r"holds 11 of 12 passages, and not 'd12': add the corpus first"):
        evaluate([f"{folder}@bm25"], data)


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
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
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
    assert len(found) == 6
    assert sentence_models.load_model(str(bi)).identity in found


def test_identical_ids_are_left_out_when_asked(tmp_path: Path) -> None:
    """In ArguAna each query is a passage as well: it finds itself first, and every figure falls."""
    folder = shelves.shelf(tmp_path / "argue")
    for path in (folder / "queries.jsonl", folder / "qrels" / "test.tsv"):
        path.write_text(path.read_text().replace('"q3"', '"d03"').replace("q3\td03", "d03\td10"))
    plain, apart = (evaluate(["bm25"], folder, ignore_identical_ids=value).sets[0] for value in (False, True))
    assert slow_first(folder, None)(QUERIES["q3"])[:2] == ["d03", "d10"], "the guard: it finds itself first"
    rows = [found.of("bm25").scores.query_ids.index("d03") for found in (plain, apart)]
    assert [found.of("bm25").scores.mrr_at_10[row] for found, row in zip((plain, apart), rows, strict=True)] == [
        0.5,
        1.0,
    ]


def test_comparisons_are_paired_and_corrected(data: Path, tmp_path: Path, bi: Path) -> None:
    """Differences against the wrong system or metric, or a correction over the wrong family, look the same in a table."""
    generator = np.random.default_rng(0)
    base = generator.random((40, 5))
    tables = {"first": [base], "same": [base.copy()], "better": [base + generator.random((40, 5)) * np.arange(5)]}
    found = {(one.model, one.metric): one for one in compare(tables, QUICK)}
    assert len(found) == 10 and {one.baseline for one in found.values()} == {"first"}
    for column, metric in enumerate(METRICS):
        same, better = found["same", metric], found["better", metric]
        assert (same.p, same.p_holm, same.difference.ends) == (1.0, 1.0, (0.0, 0.0))
        wanted = (tables["better"][0] - base)[:, column].mean()
        assert better.difference.value == pytest.approx(wanted)
        assert better.p_holm == min(1.0, 2 * better.p)
        assert better.difference.low <= wanted <= better.difference.high
    assert found["better", METRICS[0]].p == 1.0 and found["better", METRICS[1]].p < 0.001
    other = shelves.shelf(tmp_path / "other", splits=("dev",))
    both = evaluate_models(["bm25", str(bi)], [shelves.corpus(data), shelves.corpus(other)], QUICK)
    means = [
        np.mean([one.of(name).scores.table.mean(axis=0) for one in both.sets], axis=0) for name in ("bm25", "model")
    ]
    assert [both.means["bm25"][metric].value for metric in METRICS] == pytest.approx(means[0].tolist())
    assert [one.difference.value for one in both.comparisons] == pytest.approx((means[1] - means[0]).tolist())


def test_figures_do_not_depend_on_company(data: Path, bi: Path) -> None:
    """An interval that changes with the other models named cannot be quoted."""
    alone = evaluate([str(bi)], data).sets[0].of("model")
    beside = evaluate(["bm25", str(bi)], data).sets[0].of("model")
    assert alone.intervals == beside.intervals and np.array_equal(alone.scores.table, beside.scores.table)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(build_app(), ["evaluate", *words])


def test_the_command_prints_tables_and_json(data: Path, bi: Path, cross: Path, tmp_path: Path) -> None:
    """JSON that lacks what the tables show, or that cannot be parsed because of progress beside it."""
    other = shelves.shelf(tmp_path / "other")
    words = ["bm25", str(bi), str(cross), "--data", str(data), "--data", str(other), "--latency", "2"]
    words += ["--set", f"speed.cache={tmp_path / 'cache'}"]
    shown = invoke(*words, "--out", str(tmp_path / "made.json"))
    assert shown.exit_code == 0, shown.output
    for part in (
        "zoo, test: 4 queries, 12 passages",
        "nDCG@10",
        "less bm25",
        "p (Holm)",
        "encode ms",
        "mean over 2 data sets",
    ):
        assert part in shown.stdout, shown.stdout
    printed = invoke(*words, "--json")
    found, written = json.loads(printed.stdout), json.loads((tmp_path / "made.json").read_text())
    assert found["models"] == ["bm25", "model", "cross"] and len(found["sets"]) == 2
    zoo = found["sets"][0]
    assert zoo["query_ids"] == ["q1", "q2", "q3", "q4"]
    for model in zoo["models"]:
        assert set(model["metrics"]) == set(METRICS) == set(model["per_query"])
        assert np.mean(model["per_query"]["ndcg_at_10"]) == pytest.approx(
            model["metrics"]["ndcg_at_10"]["value"], abs=1e-6
        )
        assert model["latency_ms"]["queries"] == 2 and set(model["latency_ms"]["encode"]) == {"p50", "p99"}
    for one in (found, written):
        for own in one["sets"]:
            for model in own["models"]:
                del model["latency_ms"]
    assert found == written, "the second run reads what the first one kept"


def test_the_command_says_what_is_wrong(data: Path, tmp_path: Path) -> None:
    """A typo must not cost an hour of embedding before it is noticed."""
    for words, said in (
        (["bm25", "--data", str(data), "--split", "valid"], "--split 'valid' is unknown: choose train, dev, test"),
        (["bm25", "--data", str(tmp_path / "none")], "is not a folder"),
        (["bm25", "--data", str(data), "--out", str(tmp_path / "a" / "b.json")], "there is no folder"),
        (["bm25", "--data", str(data), "--data", str(data)], "data sets of different names"),
    ):
        done = invoke(*words)
        assert done.exit_code == 1 and said in done.stderr, done.output
