"""Whether a change made anything slower or larger: whence as it is beside whence of another commit, phase by phase.

    python -m benchmarks.before c90f8ff
    python -m benchmarks.before c90f8ff --alike       # what is now and was not then stays out

Either runs from its own checkout, with its own benchmark's `Worker`, in processes of its own. Phase after phase and round after
round they take turns; the other one begins each time. What counts is the median over the rounds of CPU seconds, and the most
that tensors take at once. Exits with 1 where a phase takes more than `WORSE` times what it took before.

The peak of the process' memory is printed and doesn't count: holes in the C library's heap move it by up to 15 % from one run
to the next, of the very same tensors.

With `--alike` both do the same work: without the check of gradients, which came later (`benchmarks.check` tells what it takes),
and with labels that the model draws, as by default: with the data's own, and only then, fits once kept gradients of their first
pass for the second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import PHASES
from benchmarks.worker import ONE_THREAD
from benchmarks.workloads import CACHE, WORKLOADS, prepare

WORSE = 1.03
SERVE = """
import itertools, json, os, sys
from pathlib import Path
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
torch.set_num_threads(1)
from benchmarks.worker import Worker
worker = Worker("whence", Path(sys.argv[1]))
if "alike" in sys.argv:
    from benchmarks.peers import whence_
    whence_.EXACT["labels"] = "model"
    if (Path("whence") / "engine" / "autograd.py").exists():
        from whence.engine import autograd
        autograd._is_blank = lambda point: True
def tensors(phase):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        worker.run(phase)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held) / 1e6
for line in sys.stdin:
    method, name, *folder = json.loads(line)
    call = tensors if method == "tensors" else getattr(worker, method)
    answers.write(json.dumps(call(name, *map(Path, folder))) + "\\n")
    answers.flush()
"""


def main(given: list[str] | None = None) -> int:
    """Measure and print; 0 where nothing is worse."""
    options = arguments(given)
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="whence-before-") as scratch:
        checkout = Path(scratch) / "before"
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), options.commit], check=True)
        try:
            checkouts = {"then": checkout, "now": root}
            worst = max(compared(checkouts, Path(scratch), workload, options) for workload in options.workloads)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
            shutil.rmtree(checkout, ignore_errors=True)
    print(f"at most {worst:.3f} of what it took before (target: {WORSE})")
    return int(worst > WORSE)


class Side:
    """One checkout at work on a workload, in its own process."""

    def __init__(self, root: Path, scratch: Path, workload: str, options: argparse.Namespace):
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-W", "ignore", "-c", SERVE, str(scratch), *["alike"] * options.alike]
        self.process = subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)
        self._ask("open", workload, str(options.cache.resolve()))

    def run(self, phase: str) -> dict[str, float]:
        """What a phase takes."""
        return self._ask("run", phase)

    def tensors(self, phase: str) -> float:
        """The megabytes that tensors take at most, of all at once."""
        return self._ask("tensors", phase)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, method: str, *words: str) -> Any:
        """Call a method of its `Worker`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *words]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{method} {' '.join(words)} failed; its process said why")
        return json.loads(answer)


def compared(checkouts: dict[str, Path], scratch: Path, workload: str, options: argparse.Namespace) -> float:
    """Print a line for each phase of a workload; returns the largest ratio."""
    prepare(WORKLOADS[workload], options.cache)
    sides = {name: Side(code, scratch / name, workload, options) for name, code in checkouts.items()}
    worst = 0.0
    for phase in options.phases:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(options.repeats):
            for name in sorted(sides, reverse=bool(number % 2)):
                runs[name].append(sides[name].run(phase))
        medians = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
        for name, side in sides.items():
            medians[name]["tensors_mb"] = side.tensors(phase)
        cells = []
        for key in ("cpu_s", "tensors_mb", "peak_mb"):
            then, now = medians["then"][key], medians["now"][key]
            cells.append(f"{key} {then:8.2f} -> {now:8.2f}  {now / then:.3f}")
            worst = max(worst, now / then) if key != "peak_mb" else worst
        print(f"{workload:<14} {phase:<6} {'   '.join(cells)}", flush=True)
    for side in sides.values():
        side.close()
    return worst


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = {"type": lambda text: [word for word in text.split(",") if word]}
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--workloads", **listed, default=["llama-S-mlp", "llama-S-all", "neox-S-mlp"])
    parser.add_argument("--phases", **listed, default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--alike", action="store_true", help="without what one of both does and the other does not, see above")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the models are kept")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
