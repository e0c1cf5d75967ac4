"""Repeat a recorded training with rows reweighted, and measure what becomes of the queries.

    training = read_training("runs/a/train")
    without = np.ones(len(rows))
    without[7] = 0
    found = retrain(training, without, Point(model, task, rows), queries)
    print(found.repeated, found.falls)

`K` retrainings, `Q` queries, `N` rows, `P` trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.engine.partition import keep
from whence.engine.point import Point
from whence.engine.queries import Queries
from whence.engine.stream import Examples
from whence.engine.trials import trials
from whence.errors import UsageError
from whence.progress import note, notes_only, stage
from whence.store.digest import digest, fingerprint_code
from whence.store.memory import work
from whence.train.replay import History, Replay, Run
from whence.train.replicas import at_once, repeat_steps, side_by_side

EVALUATED = 16
"""Queries or held-out rows of a batch."""


@dataclass(frozen=True)
class Repeated:
    """How near the training repeated with every row counting once comes to the one that was recorded."""

    exact: bool
    """Whether it ends at the same bits."""
    drift: float
    """How far from the recorded weights it ends, as a share of how far it went."""
    loss: float | None
    """The largest difference of a logged loss, in what steps descend (nats per token); None where none was logged."""
    logged: int
    """How many losses were."""

    def __str__(self) -> str:
        losses = "no loss was logged"
        if self.loss is not None:
            losses = f"the {self.logged} logged losses differ by {self.loss:.1e} nats at most"
        if self.exact:
            return f"the training is repeated to the bit; {losses}"
        return f"the training can't be repeated to the bit: it ends {self.drift:.1e} of its way from the model, {losses}"


@dataclass(frozen=True)
class Retrained:
    """What queries measure after retrainings, and the loss on held-out rows."""

    measured: np.ndarray
    """`[K, Q]`."""
    held_out: np.ndarray
    """Nats per prediction, `[K]`; NaN without such rows."""
    whole: np.ndarray
    """The same of the control, the training repeated with every row counting once: measured, `[Q]`, and held out, `[1]`."""
    repeated: Repeated | None
    """How near the control comes to the record; None in another order."""

    @property
    def falls(self) -> np.ndarray:
        """By how much less each query measures than after the control, `[K, Q]`."""
        return self.whole[:-1] - self.measured

    @property
    def rises(self) -> np.ndarray:
        """By how much the held-out loss is above that of the control, `[K]`."""
        return self.held_out - self.whole[-1]


def retrain(
    training: History,
    weights_KN: np.ndarray,
    point: Point,
    queries: Queries,
    *,
    extra: Examples | None = None,
    held_out: Examples | None = None,
    order: int = 0,
    start: int = 0,
    together: int | None = None,
    drift: float = 0.01,
    out: str | Path | None = None,
) -> Retrained:
    """Repeat the training that ended at the point, row `n` counting `weights_KN[k, n]` times (0: left out) in retraining `k`.

    Order, batches, number and learning rates of the steps, and what each is divided by, stay as they were recorded; with
    another `order` than 0, rows change places, the same for all. The control, in which each row counts once, is made first.
    `extra` are `M` further rows, whose weights are the last columns, `[K, N + M]`: each is read once an epoch, evenly over its
    steps, in addition to the rows of the step. The control reads none of them.
    Before the first `start` steps are over each row counts once, as recorded; a retraining then costs the steps left.
    Retrainings go `together` side by side (default: up to 16 where batches are short), and each of several processes takes the
    next. With `out` what was measured is kept in that folder, a few numbers for each, and killed work resumes to the same bits.

    Raises UsageError where the training can't be repeated, the weights are of other rows or there is no such step,
    NumericalError where the control ends further from the model than `drift`, as a share of its way.
    """
    weights_KN = np.atleast_2d(np.asarray(weights_KN, dtype=np.float64))
    count = len(point.examples) + (len(extra) if extra else 0)
    if weights_KN.shape[1:] != (count,) or not np.isfinite(weights_KN).all():
        raise UsageError(
            "These are not weights of the rows.",
            given=f"shape {weights_KN.shape}, {int((~np.isfinite(weights_KN)).sum())} not finite",
            accepted=f"[K, {count}]: how often each row counts, 0 leaves it out",
        )
    examples, how = point.examples, in_order(training.replay(), order)
    once_N = torch.ones(count, dtype=torch.float64)
    if extra is not None:
        once_N[len(examples) :] = 0
        examples, how = with_rows(extra, examples, how)
    run = Run(point.model, point.task, examples, how)
    if not 0 <= start < len(run):
        raise UsageError("The training has no such step.", given=f"start {start}", accepted=f"0 to {len(run) - 1}")

    side = together or at_once(run, len(weights_KN))

    def made_from() -> dict[str, Any]:
        known = {"training": training.identity(), "queries": queries.fingerprint, "order": order, "code": fingerprint_code()}
        known |= {"held_out": held_out.fingerprint if held_out else None, "weights": digest(weights_KN.tobytes())}
        known |= {"together": side}
        known |= ({"extra": extra.fingerprint} if extra else {}) | ({"start": start} if start else {})
        return {"stage": "retrain", **point.provenance(), **known}

    with work(out, made_from) as folder:
        place = Path(out) if out is not None else None
        if not folder.finished:
            if not folder.has("control"):
                keep(folder, "control", _control(run, once_N, start, queries, held_out))
            control = folder.load("control")
            repeated = None if order else _compared(run, training, point, control, drift)
            counts_KN = torch.from_numpy(weights_KN)
            begun_XP = control["begun"].to(run.device) if start else run.start()

            def trial(number: int) -> Tensor:
                counts = counts_KN[number * side : (number + 1) * side]
                begun_KXP = begun_XP[None].expand(len(counts), -1, -1)
                end_KXP = repeat_steps(run, begun_KXP, range(start, len(run)), lambda steps: None, counts)
                found = torch.full((side, len(queries) + 1), math.nan, dtype=torch.float64)
                found[: len(counts)] = measured_at(run, end_KXP[:, 0], queries, held_out)
                return found

            made = place / "retrainings" if place else None
            found = trials(math.ceil(len(counts_KN) / side), trial, "retrain", made_from, out=made, save_every=0)
            found = {"measured": found.flatten(0, 1)[: len(counts_KN)], "whole": control["whole"]}
            folder.write_json("repeated.json", asdict(repeated) if repeated else None)
            keep(folder, "retrained", found)
            folder.discard("retrainings")
            folder.finish()
        found, repeated = folder.load("retrained"), folder.read_json("repeated.json")
    measured = found["measured"].numpy()
    return Retrained(measured[:, :-1], measured[:, -1], found["whole"].numpy(), Repeated(**repeated) if repeated else None)


def in_order(how: Replay, order: int) -> Replay:
    """The same training with rows in each other's places; as it is for an `order` of 0."""
    names = sorted({name for step in how.steps for name in step})
    drawn = np.random.default_rng(order).permutation(len(names)) if order else range(len(names))
    other = {name: names[place] for name, place in zip(names, drawn, strict=True)}
    return replace(how, steps=[[other[name] for name in step] for step in how.steps])


def with_rows(extra: Examples, examples: Examples, how: Replay) -> tuple[Examples, Replay]:
    """The rows followed by others, and the training that reads each of these once an epoch, evenly over the epoch's steps."""
    names = [f"{extra.fingerprint}/{place}" for place in range(len(extra))]  # a row may be a copy of one that is there
    steps, distinct = len(how.steps), len({name for step in how.steps for name in step})
    epochs = max(1, round(sum(map(len, how.steps)) / distinct))
    added: list[list[str]] = [[] for _ in how.steps]
    for epoch in range(epochs):
        for place, name in enumerate(names):
            added[int((epoch + (place + 0.5) / len(names)) * steps / epochs)].append(name)
    items, rows = [*examples.items, *extra.items], [*examples.rows, *extra.rows]
    fingerprint = digest(examples.fingerprint, extra.fingerprint)
    joined = Examples(items, examples.ids + tuple(names), rows, examples.sizes + extra.sizes, fingerprint)
    return joined, replace(how, added=added)


def _control(run: Run, once_N: Tensor, start: int, queries: Queries, held_out: Examples | None) -> dict[str, Tensor]:
    """The training repeated with every row counting once: its losses, where it ends and what is measured then.

    Also the state after `start` steps, if there are any.
    """
    losses: list[Tensor] = []
    with stage("repeat", len(run), "steps") as advance:
        state_1XP, told = run.start()[None], lambda number, loss_1: losses.append(loss_1)
        begun_1XP = repeat_steps(run, state_1XP, range(start), advance, once_N, told=told)
        end_1XP = repeat_steps(run, begun_1XP, range(start, len(run)), advance, once_N, told=told)
    with notes_only():
        whole = measured_at(run, end_1XP[:, 0], queries, held_out)[0]
    found = {"end": end_1XP[0, 0], "losses": torch.cat(losses).cpu(), "whole": whole}
    return found | ({"begun": begun_1XP[0]} if start else {})


def _compared(run: Run, training: History, point: Point, control: dict[str, Tensor], drift: float) -> Repeated:
    """How near the control is to the record; raises NumericalError where it ends too far from the model."""
    end_P, losses = control["end"].to(run.device), control["losses"].double().cumsum(0)
    away = run.drift(end_P, point.model, drift)
    same = bool((end_P == run.vector(dict(point.model.named_parameters()))).all())
    differences, before = [], 0
    for step, loss in training.logged.items():
        mean = (losses[step - 1] - (losses[before - 1] if before else 0)) / (step - before)
        differences.append(abs(float(mean) - loss))
        before = step
    found = Repeated(same, away, max(differences, default=None), len(differences))
    note(str(found))
    return found


@torch.no_grad()
def measured_at(run: Run, theta_KP: Tensor, queries: Queries, held_out: Examples | None) -> Tensor:
    """What is measured of the queries and, last, the loss of the held-out rows per prediction, `[K, Q + 1]`."""
    found = torch.zeros(len(theta_KP), len(queries) + 1, dtype=torch.float64)

    def of(items: Sequence[Any], function: Any) -> Tensor:
        parts = [items[start : start + EVALUATED] for start in range(0, len(items), EVALUATED)]
        return torch.cat([side_by_side(run, theta_KP, function, run.batch(part)).double().cpu() for part in parts], 1)

    weights = torch.tensor(queries.weights, dtype=torch.float64)
    found.index_add_(1, torch.tensor(queries.owners), of(queries.items, run.task.measurements) * weights)
    found[:, -1] = math.nan
    if held_out is not None:
        items = [held_out.items[row] for row in held_out.usable]
        found[:, -1] = of(items, run.task.losses).sum(1) / sum(run.task.predictions(item) for item in items)
    return found
