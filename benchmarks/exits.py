"""How two processes that worked together end, again and again, on a machine that has other things to do.

    python -m benchmarks.exits                          # 200 repetitions
    python -m benchmarks.exits --repeat 20 --at-once 2
    python -m benchmarks.exits --runs 5                 # and whole runs by torchrun, which take half a minute each

Each repetition forks two processes that have everything imported; they share some work as a stage does, and leave.
Every second pair ends as `python -m whence` does, the others as Python ends: its exit functions, threads, and the destructors
of C++, as in a program that calls whence. What does not end with 0 is printed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.kills import environment, prepare, server

ENDS = ("whence", "Python")
"""How processes end, in turn."""

PRELOADED = ["pandas", "pyarrow.parquet", "torch.distributed", "whence.cli", "whence.cli.console", "whence.store.files"]

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
        dist.end(lambda: together(Path(place)))
    together(Path(place))
    ctypes.pythonapi.Py_Exit(0)


def together(out: Path) -> None:
    """Work that both processes share, as a stage does: gradients, sums, decisions, a table that threads read; then leave."""
    import pandas
    import torch

    from whence import dist
    from whence.cli.console import as_one
    from whence.store.files import atomic

    with as_one():
        for _ in range(3):
            weight = torch.randn(64, 64, requires_grad=True)
            (gradient,) = torch.autograd.grad((weight @ weight).square().sum(), weight)
            total = dist.add_up({"gradient": gradient})["gradient"]
            table = pandas.DataFrame({"text": dist.from_all(f"process {dist.rank()}")})
            with atomic(out / f"{dist.rank()}.parquet") as temporary:
                table.to_parquet(temporary)
            dist.on_first(pandas.read_parquet, out / "0.parquet")
            assert len(pandas.read_parquet(out / f"{dist.rank()}.parquet")) == 2 and dist.from_first(total).isfinite().all()


def repeat(place: Path, number: int) -> tuple[int | None, int | None]:
    """The exit codes of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said, context = place / f"said-{number}", server()
    context.set_forkserver_preload(PRELOADED)
    given = (port, str(place / f"pair-{number}"), str(said), ENDS[number % 2])
    pair = [context.Process(target=work, args=(rank, *given)) for rank in range(2)]
    for process in pair:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in pair:
        process.join(max(0.0, end - time.monotonic()))
    codes = pair[0].exitcode, pair[1].exitcode
    for process in pair:
        process.kill()
    if codes != (0, 0):
        sys.stdout.write(f"repetition {number}: {codes}\n{said.read_text()[-4000:]}\n")
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


def main(arguments: list[str] | None = None) -> None:
    """Repeat, and print how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=8, help="pairs that keep the machine busy for each other")
    given = parser.parse_args(arguments)
    environment()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.at_once) as threads:
        place = Path(scratch)
        ends = collections.Counter(threads.map(lambda number: repeat(place, number), range(given.repeat)))
        if given.runs:
            prepare(place / "inputs")
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
