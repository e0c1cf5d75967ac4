"""Repeat a recorded training as many replicas side by side, with rows that count otherwise or with something more to learn.

`K` replicas, `N` rows, `P` trained weights; a state `[X, P]` is what an optimizer carries from step to step
(`whence.linalg.descent`), and `[K, X, P]` those of all replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.tasks.base import Batch
from whence.train.replay import Run

Lesson = Callable[[Tensor], Tensor]
"""From the replicas' weights `[K, P]`, the loss of what each learns beside the rows, `[K]`."""


def repeat_steps(
    run: Run,
    states_KXP: Tensor,
    steps: range,
    advance: Callable[[int], None],
    counts_N: Tensor | None = None,
    lesson: Lesson | None = None,
) -> Tensor:
    """The states after some steps of the training, from those before them, `[K, X, P]`.

    Order, batches, learning rates and what a step is divided by stay as they were recorded. `counts_N` is how often each row
    counts in every step that reads it (default: once; 0 leaves it out). A `lesson` is learned in every step, as if a row of
    that loss were in its batch.
    """
    for number in steps:
        g_KP = _gradients(run, number, states_KXP[:, 0], counts_N, lesson)
        states_KXP = vmap(lambda state_XP, g_P, number=number: run.step(number, state_XP, g_P))(states_KXP, g_KP)
        advance(len(states_KXP))
    return states_KXP


def _gradients(run: Run, number: int, theta_KP: Tensor, counts_N: Tensor | None, lesson: Lesson | None) -> Tensor:
    at_KP = theta_KP.detach().requires_grad_()
    total_KP = torch.zeros_like(theta_KP)
    for place, (rows, batch, share) in enumerate(run.batches(number)):
        with torch.enable_grad():
            losses_KB = side_by_side(run, at_KP, run.task.losses, batch)
            if counts_N is not None:
                losses_KB = losses_KB * counts_N[rows].to(losses_KB)
            losses_K = losses_KB.sum(1)
            if lesson is not None and not place:  # a step may take its gradient from several batches
                losses_K = losses_K + lesson(at_KP)
        # replicas share no weight, so the gradient of their sum separates into theirs
        total_KP += torch.autograd.grad(share * losses_K.sum(), at_KP)[0]
    return total_KP


def side_by_side(run: Run, theta_KP: Tensor, function: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
    """`function(model, batch)` `[B]` at the weights of every replica, `[K, B]`."""
    if len(theta_KP) == 1:
        return run.at(theta_KP[0], function, batch).unsqueeze(0)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention can't be batched over replicas
        return vmap(lambda theta_P: run.at(theta_P, function, batch))(theta_KP)


def own_query(run: Run, queries: Sequence[Sequence[tuple[Any, float]]], times: float) -> Lesson:
    """The lesson of replicas that learn a query each, `queries[k]` being weighted items: to raise what is measured of it.

    It counts `times` as much as a row.
    """
    items = [item for query in queries for item, _ in query]
    owners = torch.tensor([k for k, query in enumerate(queries) for _ in query])
    weights = torch.tensor([weight for query in queries for _, weight in query])
    weights_KI = torch.where(owners == torch.arange(len(queries)).unsqueeze(1), weights, 0.0).to(run.device)
    batch = run.batch(items)

    def lesson(theta_KP: Tensor) -> Tensor:
        # each replica reads the queries of all: a batch of its own would have to be cut out of the model's input
        measured_KI = side_by_side(run, theta_KP, run.task.measurements, batch)
        return -times * (measured_KI * weights_KI.to(measured_KI)).sum(1)

    return lesson
