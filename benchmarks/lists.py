"""What share of an index must be read where its rows lie in lists, as FAISS's IVF keeps them, instead of one plain scan.

    python -m benchmarks.lists                # 2,000 TinyStories as they begin, stories260K
    python -m benchmarks.lists --index runs/a/index

Rows are put into lists by k-means of their directions, in coordinates in which what landmarks say is an inner product. A
question reads the lists whose centres are most like it. "recall" is the share of the best 1 % of the plain scan, with its
signs, that these lists hold: the mean of the questions held out. Lists pay where few rows hold nearly all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scan

READ = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the rows."""

BEST = 0.01


def main(given: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models and tinystories")
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--index", type=Path, help="an index that there is")
    parser.add_argument("--codes", type=Path, help="folder that keeps the index of the stories")
    options = parser.parse_args(given)
    import whence

    index = whence.open_index(options.index) if options.index else scan.real_index(options)
    rows_NJ, asked_QJ, estimates_QN = coordinates(index)
    for count in (round(len(rows_NJ) ** 0.5), 4 * round(len(rows_NJ) ** 0.5)):
        print(f"{len(rows_NJ):,} rows in {count} lists, {len(asked_QJ)} questions")
        for share, recall in recalled(rows_NJ, asked_QJ, estimates_QN, count).items():
            print(f"  {share:4.0%} of the rows read: recall {recall:.2f}")
    return 0


def coordinates(index: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and held-out questions as the landmarks see them, and the scan's estimates."""
    import torch

    directions = index._directions
    lam_J, v_JJ = torch.linalg.eigh(torch.linalg.inv(directions.inverse_JJ))
    root_JJ = v_JJ / lam_J.clamp(min=1e-9).sqrt()
    weights_QJ, rest_QK = directions.coded(directions.held_out)
    rows_NJ = torch.empty(len(index), len(root_JJ))
    for shard in index._shards:
        rows_NJ[shard["indices"]] = ((shard["codes"] * shard["scale"]).double() @ root_JJ).float()
    along, rest = index.scan_parts(weights_QJ, rest_QK)
    asked_QJ = weights_QJ.double() @ torch.linalg.inv(directions.inverse_JJ) @ root_JJ
    return rows_NJ.numpy(), asked_QJ.float().numpy(), along + index.measured["weight"] * rest


def recalled(rows_NJ: np.ndarray, asked_QJ: np.ndarray, estimates_QN: np.ndarray, count: int) -> dict[float, float]:
    """Share of the best rows that are in the lists nearest to each question, by the share of the rows in these."""
    from sklearn.cluster import KMeans

    lists = KMeans(count, n_init=1, max_iter=25, random_state=0).fit(rows_NJ / np.linalg.norm(rows_NJ, axis=1, keepdims=True))
    best = np.argsort(-estimates_QN, 1, kind="stable")[:, : max(1, round(BEST * len(rows_NJ)))]
    sizes = np.bincount(lists.labels_, minlength=count)
    found: dict[float, list[float]] = {share: [] for share in READ}
    for asked_J, best_K in zip(asked_QJ, best, strict=True):
        order = np.argsort(-(lists.cluster_centers_ @ asked_J), kind="stable")
        read = np.cumsum(sizes[order]) / len(rows_NJ)
        for share, recalls in found.items():
            recalls.append(np.isin(lists.labels_[best_K], order[: np.searchsorted(read, share) + 1]).mean())
    return {share: float(np.mean(recalls)) for share, recalls in found.items()}


if __name__ == "__main__":
    sys.exit(main())
