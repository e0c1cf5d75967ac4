"""How two processes that worked together end, again and again, on a machine that has other things to do.

    python -m benchmarks.exits                          # 200 repetitions
    python -m benchmarks.exits --repeat 20 --load 8
    python -m benchmarks.exits --runs 5                 # and whole runs by torchrun, which take half a minute each

Each repetition forks two processes that have everything imported; they fit a small model as `torchrun -m whence fit` does.
Every second pair ends as `python -m whence` does, the others as Python ends: its exit functions, threads, and the
destructors of C++, as in a program that calls whence. What does not end with 0 is printed.
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

from benchmarks.kills import ROWS_OF, SMALL, environment, prepare, server

ENDS = ("whence", "Python")
"""How processes end, in turn."""

PATIENCE = 300.0
"""Seconds after which two processes that wait for each other have failed."""


def work(rank: int, port: int, words: tuple[str, ...], place: str, said: str, how: str) -> None:
    """One of two processes: the command, and its end."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.chdir(place)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    faulthandler.enable(file=os.fdopen(out, "w"))
    import torch

    from whence import dist
    from whence.cli import main

    torch.set_num_threads(1)
    sys.argv, code = ["whence", *words], 0
    if how == "whence":
        dist.end(main)
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    ctypes.pythonapi.Py_Exit(code)


def repeat(words: tuple[str, ...], place: Path, said: Path, how: str) -> tuple[int | None, int | None]:
    """The exit codes of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = server()
    pair = [context.Process(target=work, args=(rank, port, words, str(place), str(said), how)) for rank in range(2)]
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
        place, said = Path(scratch) / "inputs", Path(scratch) / "said"
        prepare(place)
        for other in others:
            other.start()
        ends: collections.Counter[tuple[int | None, int | None]] = collections.Counter()
        for number in range(given.repeat):
            said.unlink(missing_ok=True)
            words = ("fit", "model", *ROWS_OF, *SMALL, "--method", "kfac", "-q", "-o", f"two-{number}")
            codes = repeat(words, place, said, ENDS[number % 2])
            ends[codes] += 1
            if codes != (0, 0):
                print(f"repetition {number}: {codes}\n{said.read_text()[-4000:]}", flush=True)
        whole = collections.Counter(whole_run(place, f"whole-{number}") for number in range(given.runs))
    for codes, times in ends.most_common():
        print(f"{times:5} x exit codes {codes[0]} and {codes[1]}")
    for code, times in whole.most_common():
        print(f"{times:5} x a whole run by torchrun with exit code {code}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    sys.exit(set(ends) != {(0, 0)} or not set(whole) <= {0})


if __name__ == "__main__":
    from benchmarks.exits import main as started

    started()
