"""One process per library, alive for the whole run: opens workloads, runs phases one at a time, and says what they took."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import PHASES, Peer, peer_class
from benchmarks.workloads import WORKLOADS, prepare

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""What libraries read when they are imported."""

NEEDS_FIT = ("query", "score", "self")


def serve(pipe: Connection, name: str, scratch: Path, log: Path) -> None:
    """Answer `(method, arguments)` with `(True, result)` or `(False, traceback)` until told to stop."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    worker = Worker(name, scratch)
    while (call := pipe.recv()) is not None:
        method, arguments = call
        try:
            pipe.send((True, getattr(worker, method)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Worker:
    """The library `name`, which writes below `scratch`."""

    def __init__(self, name: str, scratch: Path):
        self.name, self.scratch = name, scratch.resolve()
        self.peer: Peer | None = None
        self.fitted = False

    def open(self, workload: str, cache: Path) -> dict[str, str]:
        """Load model and data, warm up on a few examples; returns what the library can't do, and why."""
        self.peer, self.fitted = None, False
        shutil.rmtree(self.scratch, ignore_errors=True)
        asked = WORKLOADS[workload]
        folder, kind = prepare(asked, cache), peer_class(self.name)
        few = kind(replace(asked, train=min(4, asked.train), queries=min(2, asked.queries)), folder, self.scratch / "warm")
        for phase in PHASES:
            if phase not in few.cannot:
                few.run(phase)
        del few
        self.peer = kind(asked, folder, self.scratch)
        return dict(self.peer.cannot)

    def run(self, phase: str, scores: Path | None = None) -> dict[str, float]:
        """Run a phase once; its scores go to the file `scores`. CPU and wall seconds, megabytes, bytes."""
        assert self.peer is not None
        if phase in NEEDS_FIT and not self.fitted:
            self.run("fit")
        out = self.scratch / phase
        shutil.rmtree(out, ignore_errors=True)
        settle()
        before, written = memory("VmRSS"), written_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        found = self.peer.run(phase)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak, on_disk = memory("VmHWM"), disk_bytes(out)
        self.fitted |= phase == "fit"
        if found is not None and scores is not None:
            np.save(scores, np.asarray(found, dtype=np.float64))
        return {
            "cpu_s": cpu,
            "wall_s": wall,
            "peak_mb": (peak - before) / 1e6,
            "rss_mb": peak / 1e6,
            "disk_bytes": on_disk,
            "written_bytes": max(written_bytes() - written, on_disk),  # what goes through a memory map is not counted
        }

    def flops(self, phases: list[str]) -> dict[str, float]:
        """What each phase multiplies; only whence says so, of its own phases."""
        assert self.peer is not None
        count = getattr(self.peer, "flops", None)
        return {phase: count(phase) for phase in phases} if count and self.fitted else {}

    def machine(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The machine, and how fast it multiplies square matrices of these sizes on one thread."""
        import torch

        return {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu_flags()],
            "gemm_gflops": {
                str(dtype).removeprefix("torch."): {size: round(gemm_rate(size, dtype), 1) for size in sizes}
                for dtype in (torch.float32, torch.bfloat16)
            },
        }


def on_one_thread(module: str) -> None:
    """Start the command over with one thread, unless it has been; torch is left with one."""
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ONE_THREAD)
    import torch

    torch.set_num_threads(1)


def settle() -> None:
    """Give back what is free, so that a phase starts from what is really held, and reset the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(field: str) -> int:
    """A field of the process' status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def written_bytes() -> int:
    """Bytes that the process has passed to write so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def disk_bytes(folder: Path) -> int:
    """Bytes of the files in the folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def seconds(work: Callable[[], object], times: int = 9, enough: float = math.inf) -> float:
    """Median CPU seconds of the work, after one run to warm up; no more runs once they have taken `enough` CPU seconds."""
    taken: list[float] = []
    while len(taken) <= times and sum(taken) < enough:
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:] or taken)


def gemm_rate(size: int, dtype: Any) -> float:
    """GFLOP per CPU second of a square matrix product; one that takes seconds, in a format that the CPU lacks, is made once."""
    import torch

    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2e-9 * size**3 / seconds(lambda: a @ b, times=49, enough=0.5)


def cpu_model() -> str:
    """The processor's name."""
    return next((value for key, value in cpu_info() if key == "model name"), platform.processor())


def cpu_flags() -> set[str]:
    """The processor's instruction sets."""
    return next((set(value.split()) for key, value in cpu_info() if key == "flags"), set())


def cpu_info() -> list[tuple[str, str]]:
    """Lines of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    return [(key.strip(), value.strip()) for key, _, value in pairs]
