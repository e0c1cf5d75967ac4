"""Iterations that solve for something: reported step by step, saved by the clock, resumed where they were killed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from whence import dist
from whence.engine.partition import SAVE_SECONDS, SaveTimer, keep
from whence.progress import notes_only, stage
from whence.store.memory import work

State = dict[str, Tensor]
After = Callable[[State, Any], None]
"""Is given the state after each step, and what else there is to tell."""


@contextlib.contextmanager
def searching(
    made_from: Callable[[], Mapping[str, Any]],
    iterations: int,
    *,
    out: str | Path | None = None,
    save_every: float = SAVE_SECONDS,
) -> Iterator[tuple[State | None, After]]:
    """The state that an earlier search was killed in (its "steps" say how many it took), and what to call after each step.

    Stages of the passes inside are not reported: the steps are. Of several processes all search for the same.
    """
    with work(out, made_from) as folder:
        timer, state = SaveTimer(save_every), None
        if folder.has("state"):  # copied, since products of tensors that lie in a file's memory come out in other last bits
            state = {name: tensor.clone() for name, tensor in folder.load("state").items()}
        with stage("solve", iterations, "steps", done=int(state["steps"]) if state else 0) as advance, notes_only():

            def after(state: State, told: Any = None) -> None:
                advance(1)
                if dist.from_first(timer.due):
                    with timer:
                        keep(folder, "state", state)

            yield state, after
