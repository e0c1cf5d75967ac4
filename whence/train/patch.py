"""One more step on some rows, from the weights that a training ended with, and what becomes of the queries by it: tail-patch.

    found = patch(read_training("runs/a/train"), [[3, 17], [5, 8]], Point(model, task, rows), queries)
    print(-found.falls)  # by how much log p of each query rises

For models that are too large to be trained again, after Chang et al. 2024 (Scalable influence and fact tracing). The rows of a
set are one batch.

`K` sets of rows, `Q` queries, `P` trained weights, `X` rows of an optimizer's state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.coverage import trained
from whence.engine.partition import keep
from whence.engine.point import Point
from whence.engine.queries import Queries
from whence.engine.stream import Examples
from whence.engine.trials import trials
from whence.errors import UsageError
from whence.progress import note
from whence.store.digest import fingerprint_code
from whence.store.memory import work
from whence.train.replay import History, Replay, Run
from whence.train.retrain import EVALUATED, Retrained, measured_at


def patch(
    training: History,
    sets: Sequence[Sequence[int]],
    point: Point,
    queries: Queries,
    *,
    steps: int = 1,
    held_out: Examples | None = None,
    out: str | Path | None = None,
) -> Retrained:
    """Take `steps` of the training's optimizer on each set of rows, from the point's weights each time, and measure queries.

    A step descends the summed loss of the set's rows over their tokens, as the training did, by the rate of its last epoch
    (`ending_rate`) and with the second moments that AdamW ended with; momentum is at rest. It is taken in float32 or better,
    and without dropout. `whole` is what is measured before any step. Each of several processes takes the next set; with
    `out` what was measured is kept in that folder, and killed work resumes to the same bits.

    Raises UsageError where how the training moved the weights is unknown.
    """
    run, begun_XP, before = _ending(training, sets, point)

    def made_from() -> dict[str, Any]:
        known = {"training": training.identity(), "queries": queries.fingerprint, "sets": [list(rows) for rows in sets]}
        known |= {"held_out": held_out.fingerprint if held_out else None, "steps": steps, "code": fingerprint_code()}
        return {"stage": "tail-patch", **point.provenance(), **known}

    optimizer, rate = run.how.descent.optimizer, float(run.how.learning_rates[0])

    def trial(number: int) -> Tensor:
        state_XP = begun_XP
        for step in range(steps if number else 0):  # the first one measures what there is before any
            g_P = run.gradient(number - 1, state_XP[0])
            state_XP = optimizer.step(state_XP, g_P, run.decay_P, rate, before + step + 1)
        return measured_at(run, state_XP[:1], queries, held_out)[0]

    with work(out, made_from) as folder:
        if not folder.finished:
            began = time.process_time()
            trial(1)
            minutes = max(1, round((len(sets) + 1) * (time.process_time() - began) / 60))
            note(
                f"plan: {steps} step{'s' * (steps > 1)} on each of {len(sets)} sets of rows: about {minutes} "
                f"minute{'s' * (minutes > 1)} of one processor, {(3 * begun_XP.nbytes + run.decay_P.nbytes) / 1e6:.0f} MB "
                "beside the model and a copy of it"
            )
            place = Path(out) / "steps" if out is not None else None
            found = trials(len(sets) + 1, trial, "tail-patch", made_from, out=place)
            keep(folder, "patched", {"measured": found})
            folder.discard("steps")
            folder.finish()
        measured = folder.load("patched")["measured"].numpy()
    return Retrained(measured[1:, :-1], measured[1:, -1], measured[0], None)


def ending_rate(training: History) -> float:
    """The mean learning rate of the last epoch: the last step's is often 0.

    That of the whole training can be hundreds of times as large, and takes a step far beyond what is linear, so small are
    AdamW's second moments by then: it lowers every answer, whatever it reads.
    """
    read: set[str] = set()
    steps = 0
    for step in reversed(training.steps):  # no epoch reads a row twice
        if read.intersection(step):
            break
        read.update(step)
        steps += 1
    return float(training.learning_rates[-steps:].mean())


def _ending(training: History, sets: Sequence[Sequence[int]], point: Point) -> tuple[Run, Tensor, int]:
    """A run whose steps read a set each, the optimizer's state at the point `[X, P]`, and how many steps it has made."""
    descent, moved = training.descent(), trained(point.model)
    start = {name: weight for name, weight in point.model.named_parameters() if id(weight) in moved}
    last = max(training.checkpoints, key=lambda each: each.step, default=None)
    moments: Mapping[str, Tensor] = last.second_moments() if last is not None else {}
    if descent.optimizer.kind == "adamw" and not moments:
        raise UsageError(
            "How far AdamW's next step would go is unknown.",
            given=f"{'a last checkpoint without' if last is not None else 'no checkpoint with'} the optimizer's second moments",
            accepted="a training whose last checkpoint has them (whence train keeps it; of the Trainer save_only_model=False)",
        )
    steps = [[point.examples.ids[row] for row in rows] for rows in sets]
    rates = np.full(len(steps), ending_rate(training))
    how = Replay(start, steps, rates, descent, per="token", batch_size=EVALUATED)
    dtype = torch.promote_types(next(iter(start.values())).dtype, torch.float32)
    run = Run(point.model, point.task, point.examples, how, dtype)
    begun_XP = descent.optimizer.begin(run.vector(start))
    if moments:
        begun_XP[2] = run.vector({name: moments.get(name, torch.zeros(weight.shape)) for name, weight in start.items()})
    return run, begun_XP, last.step if last is not None else 0
