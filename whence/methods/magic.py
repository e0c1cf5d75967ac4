"""MAGIC: exact derivatives through the training that was recorded, step by step (Ilyas & Engstrom 2025).

`T` steps, `Q` queries, `N` rows, `P` trained weights; a state `[X, P]` is what an optimizer carries from step to step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from whence import dist
from whence.engine.partition import keep
from whence.engine.queries import Queries
from whence.methods.base import Recipe, Request
from whence.progress import note, stage
from whence.scoring.results import tabulated
from whence.settings import AtLeastZero, Count, Section, setting
from whence.store.digest import fingerprint_code
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.store.scores import Scores
from whence.tasks.outputs import check_outputs
from whence.train.replay import Run

PRICE = "the training twice, and a few times more for each query"


class Repeated(Section):
    """How the training is repeated and differentiated."""

    dtype: Literal["float32", "float64"] = setting("float32", "Format of weights and derivatives.")
    drift: AtLeastZero = setting(0.01, "How far from the model the repeated training may end, as a share of how far it went.")
    together: Count = setting(16, "Queries that are differentiated at a time: more of them are quicker and take more memory.")


def magic(request: Request, settings: Repeated) -> Scores:
    """`d m(query; theta_T(w)) / d w` at `w = 1`, `w` being what each row's loss counts in all steps that read it (section 3).

    Values are nats per copy, as those of influence functions are, but at the training that was made instead of at an optimum:
    no curvature is approximated, nothing is damped. All queries go back through the steps together.
    """
    assert request.training is not None
    point, asked, how = request.point, request.asked, request.training.replay()
    run = Run(point.model, point.task, point.examples, how, getattr(torch, settings.dtype))
    with torch.no_grad():
        check_outputs(run.task, run.model, next(run.batches(0))[1])

    def made_from() -> dict[str, Any]:
        known = {"training": request.training.identity(), "dtype": settings.dtype, "queries": asked.fingerprint}  # type: ignore[union-attr]
        return {"stage": "replay", **point.provenance(), **known, "code": fingerprint_code()}

    with work(request.place("replay"), made_from) as folder:
        every = math.ceil(math.sqrt(len(run)))
        end_P = repeat(run, folder, every)
        drift = run.drift(end_P, point.model, settings.drift)
        _warn_of_first_step(run)
        measured_Q, adjoints_QP = measure(run, asked, end_P)
        raw_QN = differentiate(run, folder, every, adjoints_QP, settings.together)
    norms = {"norm": adjoints_QP.norm(dim=1).double(), "energy": torch.ones(len(asked)).double()}
    about = {"operator": "MAGIC", "steps": len(run), "drift": drift}
    return tabulated(raw_QN, point, point, {**asked.table, "measured": measured_Q, **norms}, about, n_train=1)


def _warn_of_first_step(run: Run) -> None:
    """AdamW's first step goes by the gradient's sign, and leaving out a row that turns some of the signs is no small change."""
    share, rows = run.how.learning_rates[0] / max(run.how.learning_rates), len(run.rows[0])
    if run.how.descent.optimizer.kind == "adamw" and share > 0.25:
        note(
            f"warning: the training began at {share:.0%} of its highest learning rate, and AdamW's first step goes by the sign "
            f"of the gradient, which has no slope: values of the {rows} rows read in it may be far off. A training with a "
            "warm-up (whence train --warmup 0.1) has no such rows"
        )


def repeat(run: Run, folder: Folder | Memory, every: int) -> Tensor:
    """The weights after the last step, `[P]`; the states before every so many steps are kept, and the last one."""
    places = [*range(0, len(run), every), len(run)]
    done = max((number for number in places if folder.has(f"state-{number}")), default=0)
    state_XP = folder.load(f"state-{done}", run.device)["state"] if done else run.start()
    with stage("replay", len(run), "steps", done=done) as advance:
        for number in range(done, len(run)):
            if number in places:
                keep(folder, f"state-{number}", {"state": state_XP})
            state_XP = run.step(number, state_XP, run.gradient(number, state_XP[0]))
            advance(1)
    keep(folder, f"state-{len(run)}", {"state": state_XP})
    return state_XP[0]


def measure(run: Run, asked: Queries, theta_P: Tensor) -> tuple[Tensor, Tensor]:
    """What is measured of each query, `[Q]`, and its gradient with respect to all trained weights, `[Q, P]`."""
    measured, gradients, at = [], [], theta_P.detach().requires_grad_()
    for query in asked.weighted:
        values = [weight * run.at(at, run.task.measurements, run.batch([item])).sum() for item, weight in query]
        measured.append(torch.stack(values).sum())
        gradients.append(torch.autograd.grad(measured[-1], at)[0])
    return torch.stack(measured).detach().double(), torch.stack(gradients)


def differentiate(run: Run, folder: Folder | Memory, every: int, m_QP: Tensor, together: int) -> np.ndarray:
    """Back through all steps, `[Q, N]`, from one state that was kept to the one before; saved after each such stretch.

    Of several processes each has some of the queries.
    """
    starts = range(0, len(run), every)[::-1]
    undone = [number for number, start in enumerate(starts) if folder.has(f"adjoint-{start}")]
    own = torch.tensor(dist.share(range(len(m_QP))), dtype=torch.long)
    adjoints_QXP = torch.stack([m_QP, *[torch.zeros_like(m_QP)] * (len(run.start()) - 1)], 1)
    adjoint = {"state": adjoints_QXP, "raw": m_QP.new_zeros(len(m_QP), len(run.examples))}
    if undone:
        adjoint = folder.load(f"adjoint-{starts[undone[-1]]}", run.device)
    left = starts[undone[-1] + 1 :] if undone else starts
    with stage("differentiate", len(run), "steps", done=max(0, len(run) - every * len(left))) as advance:
        for start in left:
            steps, whole = range(start, min(start + every, len(run))), adjoint
            state_XP = folder.load(f"state-{start}", run.device)["state"]
            adjoint = {name: torch.zeros_like(part) for name, part in whole.items()}
            if len(own):
                parts = undo(run, steps, state_XP, whole["state"][own], whole["raw"][own], together)
                adjoint["state"][own], adjoint["raw"][own] = parts
            adjoint = dist.add_up(adjoint)
            keep(folder, f"adjoint-{start}", adjoint)
            for name in (f"adjoint-{start + every}", f"state-{start + every}") if start + every < len(run) else ():
                folder.drop(name)
            advance(len(steps))
    return adjoint["raw"].cpu().numpy()


def undo(
    run: Run, steps: range, state_XP: Tensor, adjoints_QXP: Tensor, raw_QN: Tensor, together: int
) -> tuple[Tensor, Tensor]:
    """Repeat some steps from the state before them, then go back through them.

    Through a step `state' = U(state, g)` with `g = sum_b w_b grad loss_b`, and `gamma` the adjoint of `g`:
    `adjoint = (dU / d state)^T adjoint' + H gamma`, and `d w_b += <grad loss_b, gamma>`.
    """
    states, gradients = [state_XP], []
    for number in steps:
        gradients.append(run.gradient(number, states[-1][0]))
        states.append(run.step(number, states[-1], gradients[-1]))
    for number, state_XP, g_P in reversed(list(zip(steps, states, gradients, strict=False))):
        adjoints_QXP, gamma_QP = run.pull(number, adjoints_QXP, state_XP, g_P)
        curved_QP, slopes_QN = run.through(number, state_XP[0], gamma_QP, together)
        adjoints_QXP[:, 0] += curved_QP
        raw_QN += slopes_QN
    return adjoints_QXP, raw_QN


RECIPES = (
    Recipe("magic", "MAGIC", "Ilyas & Engstrom 2025, section 3", magic, Repeated, needs=("training",), whole=True, price=PRICE),
)
