"""Where the time of whence's phases goes: matrix products, attention, eigenvectors, and everything element by element.

    python -m benchmarks.breakdown                           # of llama-S-mlp
    python -m benchmarks.breakdown --workload neox-S-mlp

One thread; torch's profiler, of each operator the time of its own; "the rest" is what it does not see: Python, hashing and
files. The last column is the time as a multiple of the FLOPs that it counts at the rate of a large product.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.peers import PHASES
from benchmarks.worker import gemm_rate, on_one_thread
from benchmarks.workloads import CACHE, WORKLOADS, prepare

KINDS = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::mv"),
    "attention": ("aten::_scaled_dot_product",),
    "eigenvectors": ("aten::_linalg_eigh",),
}


def kind_of(operator: str) -> str:
    """Which of `KINDS` an operator is, else "element by element"."""
    if operator.startswith(KINDS["attention"]):
        return "attention"
    return next((kind for kind, names in KINDS.items() if operator in names), "element by element")


def breakdown(workload: str, cache: Path) -> None:
    """Print a line for each phase."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.peers.whence_ import Whence
    from whence.linalg import eigh as eigenvectors

    rate = 1e9 * gemm_rate(1024, torch.float32)
    solve = eigenvectors._solve
    solving: list[float] = []

    def solved(*given: Any) -> Any:  # numpy's LAPACK is none of torch's operators
        start = time.process_time()
        found = solve(*given)
        solving.append(time.process_time() - start)
        return found

    kinds = [*KINDS, "element by element", "the rest"]
    print(f"{workload}, products of 1024 at {rate / 1e9:.0f} GFLOP per CPU second")
    print(f"{'phase':<8}{'CPU s':>8}" + "".join(f"{kind:>20}" for kind in kinds) + f"{'s / FLOPs':>12}")
    with tempfile.TemporaryDirectory() as out, mock.patch.object(eigenvectors, "_solve", solved):
        whence = Whence(WORKLOADS[workload], prepare(WORKLOADS[workload], cache), Path(out))
        for phase in ("fit", "floor", *PHASES[1:]):
            whence.run(phase)  # once to warm up
            shutil.rmtree(Path(out) / phase, ignore_errors=True)
            solving.clear()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                start = time.process_time()
                whence.run(phase)
                taken = time.process_time() - start
            shares: Counter[str] = Counter()
            for event in seen.key_averages():
                shares[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            shares["eigenvectors"] = sum(solving)
            shares["the rest"] = taken - sum(shares.values())
            line = "".join(f"{shares[kind]:>12.3f} ({shares[kind] / taken:>4.0%})" for kind in kinds)
            print(f"{phase:<8}{taken:>8.3f}{line}{taken * rate / whence.flops(phase):>12.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workload", choices=WORKLOADS, default="llama-S-mlp")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the model is kept")
    options = parser.parse_args()
    on_one_thread("benchmarks.breakdown")
    breakdown(options.workload, options.cache)


if __name__ == "__main__":
    main()
