"""Tables of README and docs, drawn from the benchmark files of record; a test fails when one is stale.

`python -m stillroom_simulations.figures FILE...` rewrites what stands between the markers
`<!-- figures: benchmarks/results/demo.json -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from stillroom_shared.statement import printed_epsilon

_BLOCK = re.compile(r"(<!-- figures: (?P<file>\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_QUALITY = {
    "teacher": "teacher, float32, exact search",
    "student": "query tower after distillation",
    "federated": "after private rounds",
    "federated_nonprivate": "after non-private rounds",
    "central": "after central fine-tuning",
    "device": "on the device: int8 towers, quantized index, private adapter",
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
        benchmark = json.loads((root / match["file"]).read_text())
        return f"{match[1]}{render(benchmark)}\n{match[3]}"

    return _BLOCK.sub(draw, page)


def render(benchmark: dict[str, Any]) -> str:
    """Both tables and the line that says what they were measured on."""
    figures, privacy, corpus = benchmark["figures"], benchmark["privacy"], benchmark["corpus"]
    quality = [f"| {words} | {_cell(figures[f'{name}.ndcg_at_10'])} |" for name, words in _QUALITY.items()]
    goals = [
        f"| {words} | {_cell(figures[name])} | {figures[name]['goal']} | {'holds' if figures[name]['holds'] else 'missed'} |"
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


def _cell(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.4f} ({low:.4f} to {high:.4f})"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refresh(path.read_text(), Path.cwd()))
