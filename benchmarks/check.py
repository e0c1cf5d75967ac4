"""What comparing captured gradients with autograd's takes, beside the fit that it comes before.

    python -m benchmarks.check
    python -m benchmarks.check --workloads llama-S-all --repeats 5

One thread, CPU seconds, medians; a fit of all of the workload's rows, with nothing set but the modules.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.worker import on_one_thread, seconds
from benchmarks.workloads import CACHE, WORKLOADS, prepare, text

SHARE, SECONDS = 0.03, 2.0
"""What it may take: one or the other."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    small = [name for name, workload in WORKLOADS.items() if workload.size in ("tiny", "S")]
    parser.add_argument("--workloads", nargs="+", default=small, choices=WORKLOADS, help="default: the small models'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    options = parser.parse_args()
    on_one_thread("benchmarks.check")

    import whence
    from whence.engine.autograd import check_rows
    from whence.engine.point import Point
    from whence.store.memory import Memory

    print(f"{'workload':<16}{'rows':>8}{'fit, s':>10}{'check, s':>10}{'share':>9}")
    within = []
    for name in options.workloads:
        workload = WORKLOADS[name]
        model, tokenizer = whence.load_model(str(prepare(workload, options.cache)))
        task, rows = whence.CausalLM(tokenizer), [{"text": text(row)} for row in workload.sequences("train")]
        given = {"modules": workload.modules, "examples": "all", "precision": whence.Precision(products="float32")}
        point = Point(model, task, rows)
        sites = point.cover(workload.modules).sites
        check = seconds(lambda point=point, sites=sites: check_rows(Memory(), point, sites), options.repeats)
        fit = seconds(lambda: whence.fit(model, task, rows, check=False, **given), options.repeats)  # noqa: B023
        within.append(check <= SHARE * fit or check <= SECONDS)
        print(f"{name:<16}{len(rows):>8}{fit:>10.2f}{check:>10.3f}{check / fit:>9.1%}")
    print(f"at most {SHARE:.0%} of the fit or {SECONDS:g} seconds in {sum(within)} of {len(within)}")


if __name__ == "__main__":
    main()
