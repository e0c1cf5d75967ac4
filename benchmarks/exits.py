"""How two processes that worked together end, again and again, on a machine that has other things to do.

    python -m benchmarks.exits                          # 200 repetitions
    python -m benchmarks.exits --repeat 20 --load 8
    python -m benchmarks.exits --runs 5                 # and whole runs by torchrun, which take half a minute each

Each repetition forks two processes that have everything imported; they fit a small network, as a command does in several.
Every second pair ends as `python -m whence` does, the others as Python ends: its exit functions, threads, and the destructors
of C++, as in a program that calls whence. What does not end with 0 is printed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kills import environment, prepare, server

ENDS = ("whence", "Python")
"""How processes end, in turn."""

PATIENCE = 300.0
"""Seconds after which two processes that wait for each other have failed."""


def work(rank: int, port: int, place: str, said: str, how: str) -> None:
    """One of two processes, and its end."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    faulthandler.enable(file=os.fdopen(out, "w"))
    import torch

    from whence import dist

    torch.set_num_threads(1)
    if how == "whence":
        dist.end(lambda: fit(Path(place)))
    fit(Path(place))
    ctypes.pythonapi.Py_Exit(0)


def fit(out: Path) -> None:
    """Fit and score a small network in both processes, with a table that is read by threads, and leave."""
    import pandas
    import torch
    from torch import nn

    import whence
    from whence.cli.console import as_one
    from whence.validate.settings import seeded

    with as_one():
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        rows = [(point, int(point.sum() > 0)) for point in x]
        model = seeded(0, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        given = {"chunks": 2, "batch_tokens": 4}
        curvature = whence.fit(model, whence.Classification(), rows, modules="all", out=out / "factors", **given)
        whence.score(model, whence.Classification(), rows[:3], rows, curvature.inverse(0.1), out=out / "scores", **given)
        pandas.read_parquet(out / "scores" / "examples.parquet")


def repeat(place: Path, said: Path, how: str) -> tuple[int | None, int | None]:
    """The exit codes of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = server()
    pair = [context.Process(target=work, args=(rank, port, str(place), str(said), how)) for rank in range(2)]
    for process in pair:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in pair:
        process.join(max(0.0, end - time.monotonic()))
    codes = pair[0].exitcode, pair[1].exitcode
    for process in pair:
        process.kill()
    return codes


def whole_run(place: Path, name: str) -> int:
    """The exit code of `torchrun -m whence run`, in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "whence", "run", "whence.yaml", "--set", f"out={name}", "-q"],
        cwd=place,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-4000:])
    return done.returncode


def busy() -> None:
    """Other things to do."""
    while True:
        sum(range(100_000))


def main(arguments: list[str] | None = None) -> None:
    """Repeat, and print how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--load", type=int, default=4, help="processes that keep the machine busy")
    given = parser.parse_args(arguments)
    environment()
    others = [multiprocessing.get_context("spawn").Process(target=busy, daemon=True) for _ in range(given.load)]
    with tempfile.TemporaryDirectory() as scratch:
        place, said = Path(scratch), Path(scratch) / "said"
        if given.runs:
            prepare(place / "inputs")
        for other in others:
            other.start()
        ends: collections.Counter[tuple[int | None, int | None]] = collections.Counter()
        for number in range(given.repeat):
            said.unlink(missing_ok=True)
            codes = repeat(place / f"two-{number}", said, ENDS[number % 2])
            ends[codes] += 1
            if codes != (0, 0):
                print(f"repetition {number}: {codes}\n{said.read_text()[-4000:]}", flush=True)
        whole = collections.Counter(whole_run(place / "inputs", f"whole-{number}") for number in range(given.runs))
    for codes, times in ends.most_common():
        print(f"{times:5} x exit codes {codes[0]} and {codes[1]}")
    for code, times in whole.most_common():
        print(f"{times:5} x a whole run by torchrun with exit code {code}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    sys.exit(set(ends) != {(0, 0)} or not set(whole) <= {0})


if __name__ == "__main__":
    from benchmarks.exits import main as started

    started()
