"""Tables of README and docs, drawn from the benchmark files of record; a test fails when one is stale.

`python -m stillroom_simulations.figures FILE...` rewrites what stands between the markers
`<!-- figures: benchmarks/results/demo.json -->` and `<!-- end of figures -->`. Where a file is not there yet, that is said.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from stillroom_shared.statement import READERS, printed_epsilon
from stillroom_simulations.benchmark_file import outcome
from stillroom_simulations.distill_bench.tables import of_distill
from stillroom_simulations.search_bench.tables import of_search
from stillroom_simulations.utility_chart import FAMILIES

_BLOCK = re.compile(r"(<!-- figures: (?P<file>\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_QUALITY = {
    "teacher": "teacher, float32, exact search",
    "student": "query tower after distillation",
    "federated": "after private rounds",
    "federated_nonprivate": "after non-private rounds",
    "central": "after central fine-tuning",
    "device": "on the device: int8 towers, quantized index, private adapter",
}
_LEVELS = {
    "teacher": "teacher, float32, exact search",
    "student": "query tower before any round",
    "nonprivate": "after non-private rounds",
}
_GOALS = {
    "student_to_teacher": "distilled query tower / teacher",
    "federated_to_teacher": "after private rounds / teacher",
    "nonprivate_share_of_central_gain": "non-private rounds: share of the central gain",
    "device_loss": "lost on the device, nDCG@10",
}


def refresh(page: str, root: Path) -> str:
    """The page with every marked block drawn again from its benchmark file below `root`."""

    def draw(match: re.Match[str]) -> str:
        path = root / match["file"]
        drawn = (
            render(json.loads(path.read_text())) if path.exists() else f"Not measured yet: there is no {match['file']}."
        )
        return f"{match[1]}{drawn}\n{match[3]}"

    return _BLOCK.sub(draw, page)


def render(benchmark: dict[str, Any]) -> str:
    """The tables of a benchmark file, and the lines that say what they were measured on."""
    drawn = {"privacy": _of_privacy, "search": of_search, "distill": of_distill}
    return drawn.get(benchmark["name"], _of_demo)(benchmark)


def _of_privacy(benchmark: dict[str, Any]) -> str:
    """A row for each arm, a column for each corpus: the share of the non-private gain; then levels and context."""
    figures, spent, corpora = benchmark["figures"], benchmark["privacy"], benchmark["corpora"]
    arms = list(dict.fromkeys(name.rpartition(".")[2] for name in spent))
    rows = []
    for arm in arms:
        family, _, target = arm.rpartition("-")
        about = next(found for name, found in spent.items() if name.rpartition(".")[2] == arm)
        shares = [figures.get(f"{corpus}.{arm}.share_of_nonprivate_gain") for corpus in corpora]
        goals = {f"{share['goal']}" for share in shares if share and "goal" in share}
        cells = [_judged(share) if share else "not measured" for share in shares]
        others = "; ".join(
            f"{who} {'none' if value is None else printed_epsilon(value)}" for who, value in about["against"].items()
        )
        rows.append(
            f"| {FAMILIES[family]} | {target} | {about['unit']} | {others} | {' | '.join(cells)} | {' '.join(goals)} |"
        )
    levels = [
        f"| {words} | " + " | ".join(_cell(figures[f"{corpus}.{level}.ndcg_at_10"]) for corpus in corpora) + " |"
        for level, words in _LEVELS.items()
    ]
    names = " | ".join(corpora)
    deltas = sorted({f"{found['delta']:.1e}" for found in spent.values()})
    return "\n".join(
        [
            f"| mechanism | target | unit | epsilon on {next(iter(corpora))} against | {names} | goal |",
            f"|---|---|---|---|{'---|' * len(corpora)}---|",
            *rows,
            "",
            f"| nDCG@10 over all private passages, test queries | {names} |",
            f"|---|{'---|' * len(corpora)}",
            *levels,
            "",
            *(
                f"{name} ({about['hash'][:12]}): {about['passages']:,} passages, {about['queries']['train']:,} training and "
                f"{about['queries']['test']:,} test queries, {about['devices']:,} devices."
                for name, about in corpora.items()
            ),
            f"Targets are epsilon against {READERS} (user level, under local query level), delta {' or '.join(deltas)}; "
            f"against the coordinator: none, but under local the same. {len(benchmark['seeds'])} seeds. "
            f"Measured with `{benchmark['command']}` at {benchmark['commit']}.",
        ]
    )


def _judged(share: dict[str, Any]) -> str:
    """A share with its interval, and what came of its goal where it has one."""
    return _cell(share, places=2) + (f", {outcome(share)}" if "goal" in share else "")


def _of_demo(benchmark: dict[str, Any]) -> str:
    """Both tables and the line that says what they were measured on."""
    figures, privacy, corpus = benchmark["figures"], benchmark["privacy"], benchmark["corpus"]
    quality = [f"| {words} | {_cell(figures[f'{name}.ndcg_at_10'])} |" for name, words in _QUALITY.items()]
    goals = [
        f"| {words} | {_cell(figures[name])} | {figures[name]['goal']} | {outcome(figures[name])} |"
        for name, words in _GOALS.items()
    ]
    seeds = len(benchmark["seeds"])
    return "\n".join(
        [
            "| nDCG@10 over all private passages, test queries | value (95% interval) |",
            "|---|---|",
            *quality,
            "",
            "| figure | value (95% interval) | goal | outcome |",
            "|---|---|---|---|",
            *goals,
            "",
            f"Corpus {corpus['name']} ({corpus['hash'][:12]}): {corpus['passages']:,} private passages, "
            f"{corpus['queries']['test']:,} test queries, {privacy['devices']:,} devices; {seeds} seed{'s' * (seeds != 1)}. "
            f"Private rounds: epsilon {printed_epsilon(privacy['epsilon'])} (user level, delta {privacy['delta']:.1e}, against "
            "readers of releases); against the coordinator: none. "
            f"Measured with `{benchmark['command']}` at {benchmark['commit']}.",
        ]
    )


def _cell(figure: dict[str, Any], *, places: int = 4) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.{places}f} ({low:.{places}f} to {high:.{places}f})"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refresh(path.read_text(), Path.cwd()))
