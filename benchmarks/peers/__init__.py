"""The libraries behind one protocol. Names are imported when a worker opens one, so that none pays for another."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.workloads import Workload

PEERS = {
    "whence": "benchmarks.peers.whence_:Whence",
    "kronfluence": "benchmarks.peers.kronfluence_:Kronfluence",
    "bergson": "benchmarks.peers.bergson_:Bergson",
    "dattri": "benchmarks.peers.dattri_:Dattri",
}

PHASES = ("fit", "query", "score", "self", "index")
"""What every library is asked to do: fit EK-FAC; precondition the queries' gradients; score all pairs (the query side
included); self-influence of the training examples; an index of projected training gradients. The last four start from what
is on disk, the middle three from what `fit` left there."""

DAMPING = 0.1
"""Damping as a multiple of each module's mean eigenvalue."""

PROJECTION = 16
"""Each side of a module's gradient is projected to so many numbers in the index."""


class Peer(Protocol):
    """One library on one workload: `model` is loaded and the data is in memory before any phase is timed.

    A phase writes below `out/<its name>`, which is empty when it starts; phases that give scores return them, `[Q, N]` or
    `[N]`. A phase that the library can't do is in `cannot`, with the reason.
    """

    cannot: Mapping[str, str]

    def __init__(self, workload: Workload, folder: Path, out: Path): ...

    def run(self, phase: str) -> np.ndarray | None: ...


def peer_class(name: str) -> type[Peer]:
    """The class of the library; importing it imports the library."""
    module, _, kind = PEERS[name].partition(":")
    return getattr(importlib.import_module(module), kind)
