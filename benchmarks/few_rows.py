"""What an index of few rows recalls: the demo's world, 1,172 rows, and the questions of its tour.

    whence demo --out runs/demo && python -m benchmarks.few_rows runs/demo
    python -m benchmarks.few_rows runs/demo --bytes 4

The truth is EK-FAC, damping 0.1, of all rows. "landmarks" and "signs" are what the two halves of the codes recall alone;
"said" is what the index says of itself, by the questions that it held out. Exits with 1 where that is off by more than 0.15.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

OFF = 0.15


def main(given: list[str] | None = None) -> int:
    """Measure and print; 0 where what the index says of itself holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of whence demo")
    parser.add_argument("--bytes", type=float, default=1.0, help="KiB per row")
    options = parser.parse_args(given)
    import whence
    from whence.demo.model import task_of
    from whence.generation import OWN_QUESTIONS, own_questions

    model, tokenizer = whence.load_model(str(options.demo / "model"), device="cpu")
    rows, task = whence.load_data(options.demo / "corpus.jsonl"), task_of(tokenizer)
    told = json.loads((options.demo / "summary.json").read_text(encoding="utf-8"))["findings"]
    questions = [{"prompt": each["question"], "completion": f" {each['answer'].strip()}"} for each in told]
    curvature = whence.open_factors(options.demo / "factors")
    landmarks = own_questions(model, task, rows, OWN_QUESTIONS)
    index = whence.build_index(model, task, rows, curvature=curvature, landmarks=landmarks, bytes=options.bytes)
    exact = whence.score(model, task, questions, rows, curvature.inverse(0.1)).raw
    estimates = index.search(model, task, questions, curvature.inverse(0.1)).raw
    weight, index.measured["weight"] = index.measured["weight"], 0.0
    along = index.search(model, task, questions, curvature.inverse(0.1)).raw
    print(f"{index}, {len(questions)} questions, signs count {weight:.2f}")
    worst = 0.0
    for k, among in ((10, len(rows) // 50), (10, 90), (100, 90)):
        parts = {"all": estimates, "landmarks": along, "signs": estimates - along}
        found = {name: recalled(each, exact, k, among) for name, each in parts.items()}
        said = index.recall(k, among)
        worst = max(worst, abs(said - found["all"]))
        shown = "  ".join(f"{name} {share:.2f}" for name, share in found.items())
        print(f"of the exact top {k:>3} among the best {among:>3}: {shown}  said {said:.2f}")
    return int(worst > OFF)


def recalled(estimates: np.ndarray, exact: np.ndarray, k: int, among: int) -> float:
    """Share of each question's `k` best rows that are among the first of the estimates."""
    best = np.argsort(-exact, 1, kind="stable")[:, :k]
    places = np.argsort(np.argsort(-estimates, 1, kind="stable"), 1)
    return float((np.take_along_axis(places, best, 1) < among).mean())


if __name__ == "__main__":
    sys.exit(main())
