"""How fast this machine takes the products that whence makes, by the ways there are to take them.

    python -m benchmarks.products                 # rates, then a fit and its scores in float32 and with short products
    python -m benchmarks.products --rows 0        # rates alone
    python -m benchmarks.products --workload llama-S-q256 --rows 96

One thread, CPU seconds, medians; GFLOP/s where nothing else is said.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.worker import on_one_thread, seconds
from benchmarks.workloads import CACHE, WORKLOADS, prepare, text

SHAPES = (
    (1016, 256, 704),
    (1016, 704, 256),
    (1016, 704, 704),
    (1016, 256, 256),
    (1016, 1408, 1408),
    (127, 704, 256),
    (16, 704, 704),
)
"""Rows, inner width and columns: layers and rotations of width 256 and 512, an example's gradient, and few rows, which are
not rounded."""

BIASED = (257, 705, 769, 1025, 2049)
"""Widths of inputs with a one for the bias."""

WIDTHS = (256, 704, 1024, 1408)
"""Of covariances that are decomposed."""


def show_rates() -> None:
    """Products in float32, in torch's short format, and of operands rounded before."""
    import torch

    from whence.casting import RoundedOperands

    @contextlib.contextmanager
    def torchs() -> Iterator[None]:
        torch.set_float32_matmul_precision("medium")
        yield
        torch.set_float32_matmul_precision("highest")

    ways = {"float32": contextlib.nullcontext, "torch's bfloat16": torchs, "rounded before": RoundedOperands}
    print(f"{'rows x inner x columns':<24}" + "".join(f"{name:>18}" for name in ways))
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        rates = []
        for way in ways.values():
            with way():
                rates.append(2e-9 * rows * inner * columns / seconds(lambda a=a, b=b: [a @ b for _ in range(5)]) * 5)
        print(f"{f'{rows} x {inner} x {columns}':<24}" + "".join(f"{rate:>18.0f}" for rate in rates))


def show_alignment() -> None:
    """Rotations and covariances in float32 into results whose rows follow each other, and whose rows begin on cache lines."""
    import torch

    from whence.linalg.aligned import product, zeros

    names = ("rotation", "on cache lines", "covariance", "on cache lines")
    print(f"\n{'2048 rows, width':<24}" + "".join(f"{name:>18}" for name in names))
    for width in BIASED:
        x, q, total = torch.randn(2048, width), torch.randn(width, width), torch.zeros(width, width)
        apart = zeros(width, width, dtype=total.dtype, device=total.device)
        ways = (partial(torch.mm, x, q), partial(product, x, q), partial(total.addmm_, x.T, x), partial(apart.addmm_, x.T, x))
        print(f"{width:<24}" + "".join(f"{2e-9 * 2048 * width**2 / seconds(way):>18.0f}" for way in ways))


def show_eigendecompositions() -> None:
    """Seconds by torch's LAPACK and by numpy's, in float64, and by torch's in float32."""
    import numpy as np
    import torch

    ways = {
        "torch": torch.linalg.eigh,
        "numpy": lambda matrix: np.linalg.eigh(matrix.numpy()),
        "torch, float32": lambda matrix: torch.linalg.eigh(matrix.float()),
    }
    print(f"\n{'eigenvectors, width':<24}" + "".join(f"{name + ', s':>18}" for name in ways))
    for width in WIDTHS:
        x = torch.randn(4 * width, width, dtype=torch.float64) * torch.logspace(0, -3, width, dtype=torch.float64)
        taken = [seconds(lambda way=way, matrix=x.T @ x: way(matrix), 3) for way in ways.values()]
        print(f"{width:<24}" + "".join(f"{value:>18.3f}" for value in taken))


def show_defaults(name: str, rows: int, cache: Path) -> None:
    """A fit and scores with nothing set but the labels and the format of products."""
    import numpy as np

    import whence
    from whence.precision import Precision
    from whence.progress import Silent, report_to

    class Stages(Silent):
        """Prints what each stage took."""

        def end(self, stage: Any) -> None:
            print(f"  {stage.name} {stage.elapsed:.2f} s", end="")

    workload = replace(WORKLOADS[name], train=rows)
    model, tokenizer = whence.load_model(str(prepare(workload, cache)))
    train, queries = ([{"text": text(row)} for row in workload.sequences(part)] for part in ("train", "queries"))
    task, scores = whence.CausalLM(tokenizer), []
    print(f"\nDefaults, {rows} rows and {len(queries)} queries of {workload.name}:")
    for products in ("float32", "bfloat16"):
        precision = Precision(products=products)
        print(f"{products:<10}", end="")
        with report_to(Stages()):
            curvature = whence.fit(model, task, train, labels="data", precision=precision)
            scores.append(whence.score(model, task, queries, train, curvature.inverse(), precision=precision).raw)
        print()
    pairs = zip(*scores, strict=True)
    print(f"their scores correlate by {np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]):.6f}, the mean over the queries")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=576, help="training rows of the fit; 0 for none")
    parser.add_argument(
        "--workload", default="llama-S-large", choices=WORKLOADS, help="its model and queries (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the model is kept")
    options = parser.parse_args()
    on_one_thread("benchmarks.products")
    show_rates()
    show_alignment()
    show_eigendecompositions()
    if options.rows:
        show_defaults(options.workload, options.rows, options.cache)


if __name__ == "__main__":
    main()
