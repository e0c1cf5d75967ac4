"""Mirrored runs: the recorded training repeated along with the query, and what each row gains by it.

Influence is nearly symmetric: what reading a row does to the query, reading the query does to the row (Ko et al. 2024). So
nothing is differentiated: optimizer, schedule, curvature and an early stop are in what the repeated training does.

`Q` queries, `N` rows, `K` replicas that train side by side, `P` trained weights, `X` rows of an optimizer's state.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.engine.forward import values_of
from whence.engine.partition import keep
from whence.engine.trials import trials
from whence.linalg.stats import spearman
from whence.methods.base import Recipe, Request
from whence.progress import note, stage
from whence.scoring.results import measured
from whence.settings import Mirrored
from whence.store.digest import fingerprint_code
from whence.store.memory import work
from whence.store.scores import Scores
from whence.train.replay import Run
from whence.train.replicas import SIDE_BY_SIDE, announce, at_once, own_query, repeat_steps

UNLIKE = 0.4
"""Mean rank correlation with EK-FAC below which one of both is wrong; about .8 is usual."""


def mirror(request: Request, settings: Mirrored) -> Scores:
    """`(loss_z(base) - loss_z(with q)) / (eps * steps with q / epochs)`: what a copy of the query gives each row, in nats.

    Base and run with `q` are the recorded training, the query's negated measurement being added to the losses of a batch. Both
    leave out the rows that are not in the `share`: those are then read without having been learned.
    """
    assert request.training is not None
    point = request.point
    run = Run(point.model, point.task, point.examples, request.training.replay())
    order = torch.randperm(len(point.examples), generator=torch.Generator().manual_seed(settings.seed))
    read_N = order < round(settings.share * len(order))
    parts = [read_N, ~read_N] if settings.complement else [read_N]
    # what was decided is part of what folders are made from: it changes last bits, and differs between devices
    settings = settings.changed(together=_plan(request, run, settings, len(parts), bool(read_N.all())))
    if not read_N.all():  # a training on fewer rows ends elsewhere, and would not notice a wrong record
        _base(request, run, settings, "whole", torch.ones_like(read_N))
    each = [_mirrored(request, run, settings, str(part), rows_N) for part, rows_N in enumerate(parts)]
    found = torch.stack(each).mean(0)
    gains_Q = found[:, -1].numpy()
    note(f"training along with a query raises it by {np.median(gains_Q):.2g} (median); {(gains_Q <= 0).sum()} are not raised")
    label = f"mirrored run, {settings.share:.0%} of the rows{' and the others' * settings.complement}"
    scores = request.scores_of(found[:, :-1].numpy(), label, str(measured(point)["unit"]), measured=True)
    known: dict[str, Any] = {"own gain": float(np.median(gains_Q))}
    if request.factors is not None or settings.ekfac:
        ekfac = request.score(request.curvature().inverse(), "ekfac")
        known["correlation with EK-FAC"] = agreement = float(np.nanmean(spearman(scores.raw, ekfac.raw)))
        note(f"{'' if agreement > UNLIKE else 'warning: '}rank correlation with EK-FAC {agreement:.2f}")
        scores = scores.combined(ekfac, settings.ekfac) if settings.ekfac else scores
    return scores.noted(known)


def _plan(request: Request, run: Run, settings: Mirrored, parts: int, whole: bool) -> int:
    """Say what it will take; how many queries go side by side."""
    asked, rows, unread, bases = request.asked, len(request.point.examples), settings.unread(len(run)), parts + (not whole)
    side = settings.together or at_once(run, len(asked), sum(asked.sizes[:SIDE_BY_SIDE]))  # each reads the queries of all
    steps = bases * len(run) + parts * len(asked) * (len(run) - unread)
    steps += parts * (len(asked) + 1) * len(run) / (3 * run.epochs)  # rows read after each: a third of what an epoch takes
    disk_bytes = run.start().itemsize * (bases * (run.start().numel() + len(run.decay_P)) + parts * len(asked) * (rows + 1))
    announce(run, bases + parts * len(asked), steps, side, disk_bytes, own_query(run, asked.weighted[:side], settings.eps))
    return side


def _mirrored(request: Request, run: Run, settings: Mirrored, part: str, read_N: Tensor) -> Tensor:
    """What a copy of each query gives each row, and in the last column itself, `[Q, N + 1]`, of the training on some rows."""
    point, asked, unread, side = request.point, request.asked, settings.unread(len(run)), settings.together
    assert side is not None  # it was decided
    begun_1XP, end_1P = _base(request, run, settings, part, read_N)

    def losses(theta_P: Tensor) -> Tensor:
        return values_of(point, point.examples, lambda _, batch: run.at(theta_P, run.task.losses, batch), "losses")

    before_N = losses(end_1P[0])

    def trial(number: int) -> Tensor:
        queries = asked.weighted[number * side : (number + 1) * side]
        lesson, found = own_query(run, queries, settings.eps), before_N.new_zeros(side, len(before_N) + 1)
        begun_KXP = begun_1XP.expand(len(queries), -1, -1)
        end_KP = repeat_steps(run, begun_KXP, range(unread, len(run)), lambda steps: None, read_N, lesson)[:, 0]
        with torch.no_grad():
            found[: len(queries), -1] = (lesson(end_1P.expand_as(end_KP)) - lesson(end_KP)) / settings.eps
        found[: len(queries), :-1] = before_N - torch.stack([losses(theta_P) for theta_P in end_KP])
        return found

    made_from = functools.partial(_made_from, request, settings, part)
    found = trials(math.ceil(len(asked) / side), trial, "mirror", made_from, out=request.place(f"mirrored-{part}"))
    return found.flatten(0, 1)[: len(asked)] * run.epochs / (settings.eps * (len(run) - unread))


def _base(request: Request, run: Run, settings: Mirrored, part: str, read_N: Tensor) -> tuple[Tensor, Tensor]:
    """The training on these rows without a query: the state when one would first be read, and its end.

    Raises NumericalError where the training on all rows does not end at the model.
    """
    unread = settings.unread(len(run))
    with work(request.place(f"base-{part}"), functools.partial(_made_from, request, settings, part)) as folder:
        if not folder.has("base"):
            with stage("repeat", len(run), "steps") as advance:
                begun_1XP = repeat_steps(run, run.start()[None], range(unread), advance, read_N)
                end_1XP = repeat_steps(run, begun_1XP, range(unread, len(run)), advance, read_N)
            keep(folder, "base", {"begun": begun_1XP, "end": end_1XP[:, 0]})
        base = folder.load("base", run.device)
    if read_N.all():
        run.drift(base["end"][0], request.point.model, settings.drift)
    return base["begun"], base["end"]


def _made_from(request: Request, settings: Mirrored, part: str) -> dict[str, Any]:
    made = {"stage": "mirror", "settings": settings.as_json(), "part": part, "code": fingerprint_code()}
    known = {"training": request.training.identity(), "queries": request.asked.fingerprint}  # type: ignore[union-attr]
    return made | request.point.provenance() | known


RECIPES = (
    Recipe(
        "mirror",
        "Mirrored run",
        "Ko et al. 2024; the recorded training repeated along with the query",
        mirror,
        Mirrored,
        needs=("training",),
        uses=("factors",),
        whole=True,
        price="the training, repeated for each query",
    ),
)
