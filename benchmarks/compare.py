"""Compare whence with its peers: time, memory and bytes of every phase, and whether the scores agree.

    make bench         the small models, in a quarter of an hour on two cores
    make bench-full    larger models, many queries, ragged lengths, all linear layers

Every library runs the same phases on the same models and data in a process of its own, in turn, round after round. Exits
with 1 where exact scores disagree or a target for the same settings is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.peers import PEERS, PHASES
from benchmarks.quiet import Quiet
from benchmarks.report import START, Cell, Row
from benchmarks.worker import ONE_THREAD, serve
from benchmarks.workloads import CACHE, WORKLOADS, prepare
from whence.version import __version__

SMALL = ("llama-S-mlp", "llama-S-all", "neox-S-mlp")
FULL = (*SMALL, "llama-S-q256", "llama-S-ragged", "llama-M-mlp", "llama-M-all", "neox-M-mlp")
PATIENCE = 15.0
"""Seconds for each workload that may go into waiting for a quiet moment and repeating; what one leaves, the next may take."""
SQUARES = (256, 1024)
"""Sizes of the matrix products whose rates are noted; the last one's is what times are held against."""
DEFAULTS_ON = "llama-S-large"
"""The workload on which whence's own defaults meet the better peer: large enough that a sample can stand for it."""


class Remote:
    """A library in its own process."""

    def __init__(self, name: str, scratch: Path):
        spawn = multiprocessing.get_context("spawn")
        self.name, self.log = name, scratch / f"{name}.log"
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, name, scratch / name, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the process' Worker; raises RuntimeError with its traceback where it fails or dies."""
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Ask without waiting for the answer, which `receive` gives."""
        with contextlib.suppress(OSError):
            self.pipe.send((method, arguments))

    def receive(self) -> Any:
        """The answer to what was sent."""
        try:
            done, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process of {self.name} died") from None
        if not done:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process: by asking, and where it is busy or gone, by force."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.process.terminate()


class Comparison:
    """A run of the benchmark: who takes part, what is measured, how often."""

    def __init__(self, peers: list[str], phases: list[str], repeats: int, cache: Path, scratch: Path):
        self.names, self.phases, self.repeats, self.cache, self.scratch = ["whence", *peers], phases, repeats, cache, scratch
        self.remotes = {name: Remote(name, scratch) for name in self.names}
        self.started, self.quiet = time.perf_counter(), Quiet(self.say)
        self.machine = self.remotes["whence"].ask("machine", SQUARES)
        self.rate = 1e9 * self.machine["gemm_gflops"]["float32"][SQUARES[-1]]

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60

    def measure(self, workload: str, phases: list[str], names: list[str], repeats: int) -> dict[tuple[str, str], Cell]:
        """Run the phases round after round, each by every library in turn, and once more what came out unequal."""
        prepare(WORKLOADS[workload], self.cache)
        self.quiet.patience += PATIENCE
        found: dict[tuple[str, str], Cell] = defaultdict(Cell)
        for name in names:
            self.remotes[name].send("open", workload, self.cache)  # not measured, so all at once
        for name in names:
            try:
                for phase, reason in self.remotes[name].receive().items():
                    found[name, phase].reason = reason
            except RuntimeError as error:
                self.say(f"{workload}: {name} can't open it\n{error}")
                for phase in {*phases, *PHASES}:
                    found[name, phase] = Cell(reason=last_line(error), broke=True)
        for number in range(repeats):
            for phase in phases:
                self._round(workload, phase, names, found, number, f"round {number + 1} of {repeats}")
        for phase in dict.fromkeys(phases):
            if self.quiet.patience > 0 and any(found[name, phase].unsettled for name in names):
                with self.quiet.at_its_expense():
                    self._round(workload, phase, names, found, repeats, "once more")
        return found

    def _round(
        self, workload: str, phase: str, names: list[str], found: dict[tuple[str, str], Cell], number: int, which: str
    ) -> None:
        """Run a phase by every library, another one first each time; what comes up twice in a round, the peers run once."""
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            cell = found[name, phase]
            if not cell.reason and (name == "whence" or (phase in PHASES and len(cell.runs) <= number)):
                self._once(workload, phase, name, cell, which)

    def _once(self, workload: str, phase: str, name: str, cell: Cell, which: str) -> None:
        """Run a phase once and add what it took to the cell, or why it failed."""
        scores = self.scratch / "scores.npy"
        scores.unlink(missing_ok=True)
        try:
            run, disturbed = self.quiet.measure(lambda: self.remotes[name].ask("run", phase, scores))
        except RuntimeError as error:
            cell.reason, cell.runs, cell.broke = last_line(error), [], True
            self.say(f"{workload}: {phase} by {name} failed\n{error}")
            return
        if scores.exists():
            cell.scores = np.load(scores)
        cell.runs.append(run | {"disturbed": disturbed})
        self.say(f"{workload}, {which}: {phase} by {name} took {run['cpu_s']:.2f} s, {run['peak_mb']:.0f} MB")

    def compare(self, workload: str) -> list[Row]:
        """The rows of a workload: every phase, ours beside each peer's."""
        phases = [phase for phase in self.phases if phase in PHASES]
        others, index = ([phase for phase in phases if (phase == "index") == last] for last in (False, True))
        order = [*others, "floor", *index, "floor", *index, "floor"]  # an index is held against the floors beside it
        found = self.measure(workload, order, self.names, self.repeats)
        asked, floor = WORKLOADS[workload], found["whence", "floor"]
        flops = self.remotes["whence"].ask("flops", ["floor", *phases])
        share = {"query": asked.tokens("queries") / asked.tokens("train")}
        rows = []
        for phase in phases:
            for peer in self.names[1:] or [""]:
                ours, theirs = found["whence", phase], found[peer, phase] if peer else Cell()
                row = report.make_row(workload, asked.size, phase, peer, ours, theirs, floor, share.get(phase, 1.0))
                row["flop_ratio"] = report.divided(row["ours_s"], flops.get(phase, 0.0) / self.rate)
                row["flops_per_floor"] = report.divided(flops.get(phase), flops.get("floor"))
                rows.append(row)
        return rows

    def start(self, workload: str, names: list[str], repeats: int, phases: Sequence[str] = START) -> list[Row]:
        """From the start of a process to a library's scores, whence with nothing set: fresh processes, in turn."""
        folder = prepare(WORKLOADS[workload], self.cache)
        found: dict[tuple[str, str], Cell] = defaultdict(Cell)
        for _ in range(repeats):
            for name in names:
                self._start_once(name, workload, folder, found)
        rows = []
        for phase in phases:
            for peer in names[1:] or [""]:
                theirs = found[peer, phase] if peer else Cell()
                cells = (found["whence", phase], theirs, Cell())
                rows.append(report.make_row(workload, WORKLOADS[workload].size, phase, peer, *cells))
        return rows

    def _start_once(self, name: str, workload: str, folder: Path, found: dict[tuple[str, str], Cell]) -> None:
        (seen, scores, code), disturbed = self.quiet.measure(lambda: self._started(name, workload, folder))
        if code:
            for phase in ("first score", "defaults"):
                found[name, phase].reason = f"exit code {code}"
            return
        imported, scored = (seen[key] | {"disturbed": disturbed} for key in ("imported", "scored"))
        found[name, "import"].runs.append(imported)
        found[name, "first score"].runs.append(scored)
        between = {key: scored[key] - imported[key] for key in ("cpu_s", "wall_s")}
        found[name, "defaults"].runs.append(between | {"disturbed": disturbed})
        found[name, "defaults"].scores = scores
        self.say(f"start: {name} took {scored['wall_s']:.1f} s to its scores ({workload})")

    def _started(self, name: str, workload: str, folder: Path) -> tuple[dict[str, dict[str, float]], np.ndarray | None, int]:
        """What a fresh process took until it had imported and until it had scored, the scores, and its exit code."""
        module = PEERS[name].partition(":")[0]
        seen: dict[str, dict[str, float]] = {}
        with tempfile.TemporaryDirectory(dir=self.scratch) as out, open(self.scratch / f"{name}.log", "a") as log:
            begun, kept = time.perf_counter(), Path(out) / "scores.npy"
            command = [sys.executable, "-W", "ignore", "-m", module, str(folder), str(Path(out) / "work"), workload, str(kept)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    words = line.split()
                    if words and words[0] in ("imported", "scored"):
                        seen[words[0]] = {"cpu_s": float(words[1]), "wall_s": time.perf_counter() - begun}
            return seen, None if process.returncode else np.load(kept), process.returncode

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"[{self.minutes:5.1f} min] {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        for remote in self.remotes.values():
            remote.close()


def better_peer(rows: list[Row]) -> str:
    """The peer whose fit and scoring together took least on the first workload; none where none did both."""
    totals: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["workload"] == rows[0]["workload"] and row["phase"] in ("fit", "score") and row["peer_s"] is not None:
            totals[row["peer"]][row["phase"]] = row["peer_s"]
    both = {peer: sum(parts.values()) for peer, parts in totals.items() if len(parts) == 2}
    return min(both, key=lambda peer: both[peer], default="")


def last_line(error: Exception) -> str:
    """What a traceback ends in, short enough for a table."""
    return str(error).strip().splitlines()[-1][:160]


def versions(names: list[str]) -> dict[str, str]:
    """Of the libraries that take part, and of what they all use."""
    found = {"whence": __version__}
    for name in [*names[1:], "torch", "transformers"]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table and the targets."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in report.COLUMNS:
        table.add_column(name, justify="left" if name in ("workload", "phase", "peer") else "right", overflow="fold")
    for row in report.measured(result["rows"]):
        table.add_row(*report.cells(row))
    console = Console(width=max(150, Console().width))
    console.print(table)
    console.print(*report.notes(result["rows"]), sep="\n", style="dim", highlight=False)
    for verdict in result["targets"]:
        console.print(report.verdict_text(verdict), style="" if verdict["met"] else "bold red", highlight=False)


def write(result: dict[str, Any], out: Path) -> None:
    """The JSON, and Markdown and a plot beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot = out.with_suffix(".png")
    if any(row["ratio"] is not None for row in result["rows"]):
        report.draw(result["rows"], plot)
    out.with_suffix(".md").write_text(report.markdown(result, plot.name if plot.exists() else ""), encoding="utf-8")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = {"type": lambda text: [word for word in text.split(",") if word]}
    parser.add_argument("--full", action="store_true", help="the larger set of workloads")
    parser.add_argument("--workloads", **listed, help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--peers", **listed, default=[name for name in PEERS if name != "whence"], help="default: all")
    parser.add_argument("--phases", **listed, default=[*PHASES, "defaults", "start"], help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="rounds, of which the median counts")
    parser.add_argument("--defaults-on", default=DEFAULTS_ON, help="workload for whence's own defaults")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the models are kept")
    parser.add_argument("--add", action="store_true", help="to what the file has, which is replaced otherwise")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and a plot go beside it")
    options = parser.parse_args(given)
    options.workloads = options.workloads or list(FULL if options.full else SMALL)
    known = {"workloads": WORKLOADS, "peers": set(PEERS) - {"whence"}, "phases": {*PHASES, "defaults", "start"}}
    for name, accepted in known.items():
        if unknown := set(getattr(options, name)) - set(accepted):
            parser.error(f"--{name}: no {', '.join(sorted(unknown))}; there are {', '.join(accepted)}")
    options.out = options.out or Path(__file__).parent / "results" / f"{'full' if options.full else 'small'}.json"
    return options


def main(given: list[str] | None = None) -> int:
    """Measure, print, write; 0 where everything that decides is as it should be."""
    options = arguments(given)
    os.environ.update(ONE_THREAD)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # whence runs from its sources: compile these once, as the peers are
    words = [sys.executable and "python", "-m", "benchmarks.compare", *(sys.argv[1:] if given is None else given)]
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.add and options.out.exists() else {}
    rows: list[Row] = before.get("rows", [])
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="whence-bench-") as scratch:
        comparison = Comparison(options.peers, options.phases, options.repeats, options.cache.resolve(), Path(scratch))

        def add(more: list[Row]) -> None:
            """All there is so far, also on disk: whoever stops early keeps what was measured."""
            again = {(row["workload"], row["phase"]) for row in more}
            rows[:] = [*(row for row in rows if (row["workload"], row["phase"]) not in again), *more]
            result.update(
                commands=[*before.get("commands", []), shlex.join(words)],
                minutes=before.get("minutes", 0) + comparison.minutes,
                machine=comparison.machine,
                versions=before.get("versions", {}) | versions(comparison.names),
                targets=report.judge(rows),
                rows=rows,
            )
            write(result, options.out)

        try:
            for workload in options.workloads:
                add(comparison.compare(workload))
        finally:
            comparison.close()
        if "start" in options.phases:
            add(comparison.start("tiny", [name for name in comparison.names if name != "dattri"], options.repeats))
        if "defaults" in options.phases:
            names = [name for name in ("whence", better_peer(rows)) if name]
            add(comparison.start(options.defaults_on, names, 1, ["first score", "defaults"]))
    show(result)
    return 1 if report.failed(result["targets"]) else 0


if __name__ == "__main__":
    sys.exit(main())
