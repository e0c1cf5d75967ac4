"""Pieces of work that are one training each: shared out over the processes whole, reported one by one, saved by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence import dist
from whence.engine.partition import SAVE_SECONDS, SaveTimer, keep
from whence.progress import notes_only, stage
from whence.store.memory import work


def trials(
    count: int,
    trial: Callable[[int], Tensor],
    name: str,
    made_from: Callable[[], Mapping[str, Any]],
    *,
    out: Path | None = None,
    save_every: float = SAVE_SECONDS,
) -> Tensor:
    """`trial(number)` for every number below `count`, `[count, ...]`.

    Of several processes each takes the next one, and is alone with it. `name` is the stage that is reported; stages inside
    are not. `out` is a folder from which a killed run resumes, saved every `save_every` seconds or so.
    """
    with work(out, made_from) as folder:
        timer, done = SaveTimer(save_every), folder.load("trials") if folder.has("trials") else {}
        left = [number for number in range(count) if str(number) not in done]
        with stage(name, count, "trainings", done=len(done)) as advance, notes_only():
            for start in range(0, len(left), dist.world()):
                now = left[start : start + dist.world()]
                with dist.agreeing():
                    mine = dist.share(now)
                    with dist.alone():
                        found = {str(number): trial(number).cpu() for number in mine}
                done |= dist.to_all(dist.merged(found))
                advance(len(now))
                if dist.from_first(timer.due):
                    with timer:
                        keep(folder, "trials", done)
    return torch.stack([done[str(number)] for number in range(count)])
