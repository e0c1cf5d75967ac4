"""Functions run in several processes that work together, started quickly: their modules are imported once, by a server."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from distributed.work import kill_at

PATIENCE = 180
"""Seconds after which processes that wait for each other are a failed test."""


def run(work: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What the function returns or raises in each of the processes; the negative number of a signal that ended one.

    A single one is what `python` starts, not what `torchrun` does: the Trainer of transformers would take a group of one.
    """
    context, port = server(), _free_port()
    started = []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        stacks = tempfile.NamedTemporaryFile("r")  # noqa: SIM115  # removed with the last reference to it
        process = context.Process(target=_main, args=(theirs, stacks.name, rank, world, port, work, arguments))
        process.start()
        theirs.close()
        started.append((process, mine, stacks))
    try:
        sent = [_received(process, results, stacks) for process, results, stacks in started]
        for process, *_ in started:
            process.join(PATIENCE)
    finally:
        for process, *_ in started:
            process.kill()
    pairs = zip(sent, started, strict=True)
    return [process.exitcode if result is None else pickle.loads(result) for result, (process, *_) in pairs]


def server() -> ForkServerContext:
    """What starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed.warm"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])  # for the server
    return context


def killed(stage: str, advances: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Do the work in a process of its own, which ends in the stage as `kill -9` ends it."""
    (end,) = run(kill_at, stage, advances, None, work, *arguments, world=1)
    assert end == -signal.SIGKILL, end


def torchrun(*words: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of whence in two processes, as users do."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*launcher, "-m", *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def launched(module: str, *words: Any) -> tuple[bool, str]:
    """Whether torchrun's agent says that two processes of the module came through, and what these wrote to stderr.

    The same as `torchrun`, but agent and processes are forked from the server, which has everything imported.
    """
    with tempfile.NamedTemporaryFile("r") as said:
        (succeeded,) = run(_launch, said.name, module, list(map(str, words)), world=1)
        return succeeded, said.read()


def _launch(said: str, module: str, words: list[str]) -> bool:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    nodes: dict[str, Any] = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(**nodes, nproc_per_node=2, max_restarts=0, start_method="fork")
    try:
        elastic_launch(config, _as_module)(module, words)
    except ChildFailedError:
        return False
    return True


def _as_module(module: str, words: list[str]) -> None:
    """What `python -m MODULE ...` does, begun without the agent's handlers of signals."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _received(process: BaseProcess, results: Connection, stacks: IO[str]) -> bytes | None:
    if not results.poll(PATIENCE):
        os.kill(process.pid or 0, signal.SIGUSR1)
        time.sleep(1)
        raise AssertionError(f"{process.name} still waits:\n{stacks.read()}")
    try:
        return results.recv_bytes()
    except EOFError:
        return None


def _main(
    results: Connection,
    stacks: str,
    rank: int,
    world: int,
    port: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Run the function in the environment that torchrun makes; one process is on its own. SIGUSR1 asks where it is."""
    faulthandler.register(signal.SIGUSR1, file=Path(stacks).open("w"))  # noqa: SIM115  # open to the end
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    import torch

    from whence import dist

    torch.set_num_threads(1)
    try:
        results.send_bytes(pickle.dumps(work(*arguments)))
        dist.leave()
    except Exception as error:
        results.send_bytes(pickle.dumps(error))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
