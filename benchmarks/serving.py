"""What a served device bears (`stillroom_simulations.serving_load`), for a home and queries of your own.

    python benchmarks/serving.py --home HOME --queries queries.jsonl [--seconds 60] [--clients 64] --out FILE

Queries are the `text` of each line. `load` is the machine's before the run: a busy one makes every figure worse.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from stillroom_simulations.serving_load import serving_load


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--queries", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with open(asked.queries, encoding="utf-8") as lines:
        queries = [json.loads(line)["text"] for line in lines]
    load = os.getloadavg()[0]
    found = serving_load(asked.home, queries, asked.seconds, asked.clients, asked.seed, workers=asked.workers)
    figures = {**asdict(found), "tail": found.tail, "growth": found.growth, "load": load, "workers": asked.workers}
    asked.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
