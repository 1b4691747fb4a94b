"""`stillroom evaluate`: splits, refusals, comparisons, and what is printed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.simulations import shelves
from tests.simulations.shelves import PASSAGES, QUERIES, check, evaluate, slow_first
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from stillroom_client.device import Device
from stillroom_shared.cli import build_app
from stillroom_shared.errors import DataError, SettingsError
from stillroom_shared.release import Release
from stillroom_shared.scales import FIRST_SHARE
from stillroom_simulations.evaluating.homes import Home
from stillroom_simulations.evaluating.run import Choices, compare, evaluate_models
from stillroom_simulations.evaluating.specs import Opener
from stillroom_simulations.evaluating.values import METRICS

QUICK = Choices(timed=0, resamples=50)


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
        ([f"{bi}::a::b"], "'a::b' is no folder, and no model of that name"),
        ([f"{bi}@8::{release}"], "query vectors have 8 dimensions and passage vectors 32"),
        ([f"{bi}@64"], "@64: vectors of 32 values"),
        (["bm25@int8"], "@int8 says nothing of a bm25"),
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
    with Device.open(folder) as device:
        device.add(
            [replace(shelves.corpus(data).passages[0], text="of another corpus"), *shelves.corpus(data).passages[1:]]
        )
    with pytest.raises(
        DataError, match=r"other texts than the corpus under 1 of its 12 ids, 'd01' say: add the corpus again"
    ):
        evaluate([f"{folder}@bm25"], data)


def test_a_cross_encoder_reads_what_a_device_holds_beside_the_corpus(
    data: Path, cross: Path, tmp_path: Path, tiny_release: Release
) -> None:
    """A device is somebody's own: what nobody judged is found, read and ranked."""
    folder = tmp_path / "device"
    with Device.create(folder, tiny_release, link=True) as device:
        passages = shelves.corpus(data).passages
        device.add([*passages, *(replace(one, id=f"own-{one.id}", text=f"own {one.text}") for one in passages)])
    found = evaluate([str(cross), f"{folder}@bm25"], data, first_stage=f"{folder}@bm25", rerank=20)
    read, alone = (one.scores.of("recall_at_100") for one in found.sets[0].models)
    assert (read > 0).any() and np.array_equal(read, alone), "the same passages, in another order"


def test_a_device_has_one_thread_however_many_embed(home: Path) -> None:
    """Its reranker on eight cores under the heading "on one thread", beside models that have one."""
    with Opener(threads=2) as opener:
        [system] = opener.systems([f"{home}@hybrid"])
        assert isinstance(system, Home) and system.device.threads == 1


def test_a_folder_may_have_a_reserved_name(
    data: Path, bi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called bm25 that cannot be named beside BM25, or whose figures stand under that name."""
    for place in ("bm25", "runs/bm25"):
        shutil.copytree(bi, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    found = evaluate(["bm25", "./bm25", "runs/bm25"], data)
    assert [one.model for one in found.sets[0].models] == ["bm25", "./bm25", "runs/bm25"]
    check(found, "bm25", slow_first(data, None))
    check(found, "./bm25", slow_first(data, bi))
    assert [one.model for one in evaluate(["runs/bm25"], data).sets[0].models] == ["runs/bm25"]


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


def test_a_cross_encoder_does_not_read_what_is_left_out(tmp_path: Path, bi: Path, cross: Path) -> None:
    """Read before it goes, the passage takes the place of another, and its score moves the scale of all others."""
    text, tables = shelves.full_texts()["d03"], []
    for name, held in (("without", {key: PASSAGES[key] for key in PASSAGES if key != "d03"}), ("with", PASSAGES)):
        folder = shelves.shelf(tmp_path / name)
        lines = [{"_id": key, "title": title, "text": text} for key, (title, text) in held.items()]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "queries.jsonl").write_text(json.dumps({"_id": "d03", "text": text}) + "\n")
        grades = [f"d03\t{key}\t{grade}\n" for grade, key in enumerate(PASSAGES) if key != "d03"]
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(grades))
        for split in ("dev", "train"):
            (folder / "qrels" / f"{split}.tsv").unlink()
        for top in (2, 4):
            found = evaluate([str(cross)], folder, first_stage=str(bi), rerank=top, ignore_identical_ids=True)
            tables.append(found.sets[0].of("cross").scores.table.tolist())
    assert slow_first(folder, bi)(text)[0] == "d03", "the guard: it would be read"
    assert tables[:2] == tables[2:]


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


def test_the_command_can_leave_the_first_stage_out_of_a_rerankers_scores(
    data: Path, cross: Path, tmp_path: Path
) -> None:
    """An option that is parsed and forgotten; a default of the command line that is not the device's."""
    words = [str(cross), "--data", str(data), "--latency", "0", "--set", f"speed.cache={tmp_path / 'cache'}", "--json"]
    told = [json.loads(invoke(*words, *more).stdout) for more in ([], ["--first-share", "0"])]
    assert [one["first_stage"]["share"] for one in told] == [FIRST_SHARE, 0]
    assert ["share of" in one["sets"][0]["models"][0]["how"] for one in told] == [True, False]
    assert told[0]["sets"][0]["models"][0]["per_query"] != told[1]["sets"][0]["models"][0]["per_query"]
    assert invoke(*words, "--first-share", "2").exit_code == 2


def test_the_command_says_what_is_wrong(data: Path, tmp_path: Path) -> None:
    """A typo must not cost an hour of embedding before it is noticed."""
    for words, said in (
        (["bm25", "--data", str(data), "--split", "valid"], "--split 'valid' is unknown: choose train, dev, test"),
        (["bm25", "--data", str(tmp_path / "none")], "is not a folder"),
        (["bm25", "--data", str(data), "--out", str(tmp_path / "a" / "b.json")], "there is no folder"),
        (["bm25", "--data", str(data), "--out", str(tmp_path)], "is a folder: name a file in it"),
        (["bm25", "--data", str(data), "--data", str(data)], "data sets of different names"),
    ):
        done = invoke(*words)
        assert done.exit_code == 1 and said in done.stderr, done.output
