"""How many examples do factors need? Scores with factors of samples, against scores with factors of all examples.

    python -m benchmarks.sampling --model MODEL --data ROWS --limit 1000 --queries 16

The beginnings of the data's last rows are the queries; the others are fitted on and scored. float32 throughout.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import whence
from whence.precision import EXACT


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, help="anything that whence.load_data reads")
    parser.add_argument("--limit", type=int, help="read so many rows")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--characters", type=int, default=200, help="so much of a query is asked about")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = whence.load_model(args.model, dtype="float32")
    task = whence.CausalLM(tokenizer, max_length=args.max_length)
    rows = [{"text": row["text"]} for row in whence.load_data(args.data, limit=args.limit)]
    train, asked = rows[: -args.queries], rows[-args.queries :]
    queries = [{"prompt": "", "completion": row["text"][: args.characters]} for row in asked]

    def scores(**sample: Any) -> tuple[np.ndarray, dict[str, Any]]:
        curvature = whence.fit(model, task, train, precision=EXACT, **sample)
        return whence.score(model, task, queries, train, curvature.inverse(), precision=EXACT).raw, curvature.about

    exact, about = scores(examples="all", disjoint=False)
    print(f"{about['examples']} rows, {about['positions']:,} positions; Pearson with the scores of all, mean (worst query)\n")
    print("| rows in each pass | positions | the same rows | two samples apart |\n|---|---|---|---|")
    default, made = scores()
    chosen = (made["examples"], made["eigenvalue_examples"])
    for size in args.sizes:
        same, about = scores(examples=size, disjoint=False)
        apart = correlation(scores(examples=size, disjoint=True)[0], exact) if 2 * size <= len(train) else ""
        print(f"| {size} | {about['positions']:,} | {correlation(same, exact)} | {apart} |", flush=True)
    print(f"| by default: {chosen[0]}, {chosen[1]} | {made['positions']:,} | | {correlation(default, exact)} |")


def correlation(found: np.ndarray, exact: np.ndarray) -> str:
    """Mean and lowest Pearson correlation of the queries' scores."""
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, exact, strict=True)]
    return f"{np.mean(each):.4f} ({np.min(each):.4f})"


if __name__ == "__main__":
    main()
