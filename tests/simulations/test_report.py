"""The report: no epsilon out of context, no figure that was not measured, one page that everybody can read."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.references.results import sample_results

from stillroom_shared.errors import DataError
from stillroom_simulations.charts import quality_chart_svg
from stillroom_simulations.intervals import Interval
from stillroom_simulations.report import (
    EpsilonContextError,
    check_epsilon_context,
    headline,
    render_report,
    rewrite_report,
    write_report,
)
from stillroom_simulations.results import STAGES, Ratio, Results


def changed(path: str, value: object) -> dict[str, Any]:
    """The sample with one field changed; a number in the path is a place in a list."""
    values = sample_results()
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    target: Any = values
    for key in parents:
        target = target[key]
    target[last] = value
    return values


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(Results.parse(sample_results()))


# What is refused


@pytest.mark.parametrize("words", ["user level", "delta", "readers of releases", "none"])
def test_the_page_fails_the_rule_once_a_part_is_lost(page: str, words: str) -> None:
    """If the template lost one of the parts and the rule did not notice, neither would anybody else."""
    check_epsilon_context(page)
    with pytest.raises(EpsilonContextError):
        check_epsilon_context(page.replace(words, "..."))


def test_a_bare_epsilon_is_not_written(tmp_path: Path) -> None:
    """A rule that holds in tests only does not protect the page of a real run."""
    with pytest.raises(EpsilonContextError, match=r"We spent epsilon 3\.71"):
        write_report(changed("privacy.paragraph", "We spent epsilon 3.71."), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("teacher.ndcg_at_10", float("nan"), r"teacher\.ndcg_at_10"),
        ("teacher.ndcg_at_10", 1.2, r"teacher\.ndcg_at_10"),
        ("teacher.accuracy", 0.5, r"teacher\.accuracy: Extra inputs"),
        ("privacy.coordinator", "some", r"privacy\.coordinator"),
        ("corpus.hash", "", r"corpus\.hash"),
        ("schema", 2, r"field schema"),
        ("device.intervals", {"ndcg_at_10": [0.6, 0.5]}, "lower end 0.6 is above"),
        ("ratios.device_loss.holds", False, "holds is False, but interval"),
        ("ratios.device_loss.goal", "< 0.005", "'< 0.005' is not understood"),
        ("rounds.3.round", 2, "each must be there once, in order"),
        ("rounds.3.epsilon", 0.1, "spent privacy does not come back"),
    ],
)
def test_results_that_cannot_be_are_refused(path: str, value: object, complaint: str) -> None:
    """A figure that was not measured, or a verdict its interval contradicts, must not reach a page."""
    with pytest.raises(DataError, match=complaint):
        Results.parse(changed(path, value))


def test_missing_results_are_refused_by_name(tmp_path: Path) -> None:
    """A default in place of a stage that did not run would be published as a figure."""
    values = sample_results()
    del values["federated"]
    with pytest.raises(DataError, match="field federated: Field required"):
        Results.parse(values)
    with pytest.raises(DataError, match=r"results\.json cannot be read .*stillroom demo"):
        rewrite_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json is not JSON"):
        rewrite_report(tmp_path)


def test_goals_are_judged_by_the_whole_interval() -> None:
    """A mean above the goal with an interval that reaches below it is luck, not a goal that holds."""
    assert Ratio.judge(Interval(0.97, 0.9601, 0.98), ">= 0.96").holds
    assert not Ratio.judge(Interval(0.97, 0.9599, 0.98), ">= 0.96").holds
    assert Ratio.judge(Interval(0.003, -0.001, 0.005), "<= 0.005").holds
    assert not Ratio.judge(Interval(0.003, 0.001, 0.0051), "<= 0.005").holds


# What is written


def test_files_carry_the_same_figures(tmp_path: Path) -> None:
    """Page and results.json are cited apart; if they differed, one of them would be wrong."""
    file = write_report(sample_results(), tmp_path / "new" / "folder")
    values = json.loads((file.parent / "results.json").read_text())
    expected = Results.parse(sample_results())
    assert Results.load(file.parent / "results.json") == expected
    assert values["teacher"]["ndcg_at_10"] == 0.494 and values["schema"] == 1
    before = file.read_text()
    file.unlink()
    assert rewrite_report(file.parent) == file and file.read_text() == before == render_report(expected)


def test_stable_keys(tmp_path: Path) -> None:
    """Others read results.json by these names."""
    write_report(sample_results(), tmp_path)
    values = json.loads((tmp_path / "results.json").read_text())
    keys = [f"{stage}.ndcg_at_10" for stage in STAGES] + [
        "privacy.epsilon", "privacy.delta", "privacy.unit", "privacy.mechanism", "query_tower.parameters",
        "query_tower.bytes", "adapter.bytes", "search.p50_ms", "search.p99_ms", "seconds.distil",
    ]  # fmt: skip
    for key in keys:
        group, name = key.split(".")
        assert values[group][name] is not None, key


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        *((f"{stage}.ndcg_at_10", 0.31234, "0.312") for stage in STAGES),
        *((f"{stage}.own_index.recall_at_10", 0.81234, "0.812") for stage in STAGES),
        ("student.intervals", {"ndcg_at_10": [0.1234, 0.9876]}, "0.123\u20130.988"),
        ("privacy.epsilon", 1.2345, "epsilon 1.24 (user level"),
        ("privacy.against", {"peers and network observers": 77.77}, "77.77"),
        ("privacy.epsilon_by_accountant", {"PLD": 3.71, "RDP": 55.55}, "55.55"),
        ("privacy.noise_multiplier", 4.56, "4.56"),
        ("privacy.paragraph", "What we promise.", "What we promise."),
        ("adapter.bytes", 5_000_000, "4.8 MiB"),
        ("search.p99_ms", 98.76, "98.76"),
        ("devices.passages_max", 123_456, "123,456"),
        ("seconds", {"tea": 3_661.0}, "61 min 01 s"),
        ("peak_memory_bytes", 5 * 1024**3, "5.0 GiB"),
        ("corpus.hash", "0123456789abcdef", "0123456789abcdef"),
        ("versions", {"quince": "4.2"}, "quince 4.2"),
        ("seed", 4_711, "Seed 4711"),
        ("machine", "an abacus", "an abacus"),
        ("examples.0.query", "unheard of", "unheard of"),
        ("ratios.student_to_teacher.value", 0.5678, "0.5678"),
    ],
)
def test_every_figure_comes_from_the_results(page: str, path: str, value: object, shown: str) -> None:
    """A figure typed into the template would survive every run, whatever was measured."""
    assert shown not in unescape(page)
    assert shown in unescape(render_report(Results.parse(changed(path, value))))


def test_a_missed_goal_stays_visible() -> None:
    """A report that shows only what went well is an advertisement."""
    found = render_report(Results.parse(sample_results()))
    assert (found.count("\u2717 missed"), found.count("\u2713 held")) == (1, 2)
    values = changed("ratios", {"student_to_teacher": Ratio.judge(Interval(0.97, 0.965, 0.98), ">= 0.96").model_dump()})
    assert "\u2717 missed" not in render_report(Results.parse(values))


def test_headline_says_which_way_it_went() -> None:
    """A headline that always celebrates would be believed once."""
    assert headline(Results.parse(sample_results())).endswith("bring a small query tower to 99.4% of its teacher")
    worse = headline(Results.parse(changed("federated.ndcg_at_10", 0.4)))
    assert "cost the query tower 0.075" in worse and "81.0%" in worse


def test_no_privacy_is_called_none() -> None:
    """The non-private run goes through the same page, and must not borrow the private one's words."""
    values = sample_results()
    values["privacy"] |= {"epsilon": None, "mechanism": "none", "noise_multiplier": None, "clip_norm": None}
    values["privacy"] |= {
        "epsilon_by_accountant": {"PLD": None},
        "against": {},
        "paragraph": "No differential privacy.",
    }
    values["rounds"] = [one | {"epsilon": None} for one in values["rounds"]]
    found = render_report(Results.parse(values))
    assert "no differential privacy (mechanism none)" in found and "3.71" not in found


def test_text_is_escaped() -> None:
    """Passages are other people's text: markup in them must be shown, not run."""
    values = changed("examples.0.results.teacher.0.text", "</p><script>alert(1)</script> a < b & c")
    values["examples"][0]["query"] = "<img src=x onerror=alert(1)>"
    found = render_report(Results.parse(values))
    assert "<script" not in found and "<img" not in found
    assert "&lt;/p&gt;&lt;script&gt;alert(1)&lt;/script&gt; a &lt; b &amp; c" in found


def test_examples_say_where_the_answer_is() -> None:
    """A miss by one rank and a miss by a thousand are not the same."""
    values = sample_results()
    ranking = values["examples"][0]["results"]["student"]
    assert "the answer is number 2" in render_report(Results.parse(values))
    values["examples"][0]["results"]["student"] = [ranking[0]]
    found = render_report(Results.parse(values))
    assert "the answer is not among the first 1" in found
    values["examples"][0]["results"]["student"] = []
    assert "nothing was found" in render_report(Results.parse(values))


# What it looks like


def test_page_is_self_contained(page: str) -> None:
    """An asset fetched from elsewhere breaks the archive, and tells its host who reads the report."""
    bare = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for forbidden in ("http:", "https:", "//", "<script", "<link", "<iframe", "src=", "@import", "url("):
        assert forbidden not in bare, forbidden


class Outline(HTMLParser):
    """Open elements, and those that were closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.wrong: list[str] = []
        self.started: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.started.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "img"}:
            self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.path or self.path.pop() != tag:
            self.wrong.append(tag)


def test_page_is_well_formed_and_labelled(page: str) -> None:
    """A screen reader needs captions, headers with a scope, and words for pictures; a phone needs a viewport."""
    outline = Outline()
    outline.feed(page)
    assert not outline.wrong and not outline.path
    tags = [tag for tag, _ in outline.started]
    assert tags.count("table") == tags.count("caption") >= 6
    assert tags.count("figure") == tags.count("figcaption") == 2 and tags.count("h1") == 1
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in outline.started if tag == "th")
    pictures = [attributes for tag, attributes in outline.started if tag == "svg"]
    assert len(pictures) == 4 and all(p["role"] == "img" and len(p["aria-label"] or "") > 40 for p in pictures)
    assert ("html", {"lang": "en"}) in outline.started
    assert any(attributes.get("name") == "viewport" for tag, attributes in outline.started if tag == "meta")


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG 2.2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_the_book() -> None:
    """Black on white is 21:1 and #767676 on white the lightest grey that passes: else the next test means nothing."""
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#767676", "#fff") == pytest.approx(
        4.54, abs=0.01
    )


@pytest.mark.parametrize("where", ["report", "picture"])
def test_colours_can_be_read_in_light_and_dark(page: str, where: str) -> None:
    """Grey on grey looks fine on the screen of whoever chose it (WCAG AA: 4.5 for text, 3 for marks)."""
    style = page if where == "report" else quality_chart_svg(Results.parse(sample_results()))
    themes = [dict(re.findall(r"--(\w+): ?(#[0-9a-f]+)", block)) for block in re.findall(r":root ?\{[^}]*\}", style)]
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys() and themes[0] != themes[1]
    for theme in themes:
        for text in {"ink", "soft", "hero", "miss"} & theme.keys():
            assert contrast(theme[text], theme["paper"]) >= 4.5, text
        assert contrast(theme["faint"], theme["paper"]) >= 3
