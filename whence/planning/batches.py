"""A few real batches: what forward and activation-only backward take here, for a model that has its weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from whence.capture import Capture
from whence.coverage import Site
from whence.engine.stream import Sink, encode, likelihood, stream
from whence.tasks.base import Task

REPEATS = 3


def floor_of(model: nn.Module, task: Task, sites: Mapping[str, Site], rows: Sequence[Any]) -> float:
    """Seconds of one batch of these rows through the model and back, the least of a few."""
    examples = encode(task, rows)
    batch = [list(range(len(rows)))]
    times = []
    with Capture(model, dict(sites)) as capture:
        for _ in range(REPEATS):
            began = time.perf_counter()
            stream(capture, task, examples.items, batch, likelihood(task, examples), Sink(), lambda positions: None)
            times.append(time.perf_counter() - began)
    return min(times)
