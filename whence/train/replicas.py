"""Repeat a recorded training as many replicas side by side, with rows that count otherwise or with something more to learn.

`K` replicas, `N` rows, `P` trained weights; a state `[X, P]` is what an optimizer carries from step to step
(`whence.linalg.descent`), and `[K, X, P]` those of all replicas.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.progress import note
from whence.tasks.base import Batch
from whence.train.replay import Run

SIDE_BY_SIDE, WEIGHTS = 16, 2**24
"""Replicas that train side by side at most, and the weights that they have together."""

SHORT = {"cpu": 1e9, "cuda": 1e12}
"""FLOPs of a batch, 6 per weight and position, up to which replicas go side by side: where that is no slower than one after the
other, as measured on a CPU (5e8 to 1.2e9, stories260K); reckoned, not measured, on a GPU."""

Lesson = Callable[[Tensor], Tensor]
"""From the replicas' weights `[K, P]`, the loss of what each learns beside the rows, `[K]`."""


def repeat_steps(
    run: Run,
    states_KXP: Tensor,
    steps: range,
    advance: Callable[[int], None],
    counts_N: Tensor | None = None,
    lesson: Lesson | None = None,
    told: Callable[[int, Tensor], None] = lambda number, losses_K: None,
) -> Tensor:
    """The states after some steps of the training, from those before them, `[K, X, P]`.

    Order, batches, learning rates and what a step is divided by stay as they were recorded. `counts_N` is how often each row
    counts in every step that reads it (default: once; 0 leaves it out), `[K, N]` where replicas differ. A `lesson` is learned
    in every step, as if a row of that loss were in its batch. `told` hears the loss that each step descends.
    """
    for number in steps:
        g_KP, losses_K = _gradients(run, number, states_KXP[:, 0], counts_N, lesson)
        told(number, losses_K)
        states_KXP = vmap(lambda state_XP, g_P, number=number: run.step(number, state_XP, g_P))(states_KXP, g_KP)
        advance(len(states_KXP))
    return states_KXP


def at_once(run: Run, count: int, beside: int = 0) -> int:
    """How many of `count` replicas to train side by side; each reads `beside` positions of lessons in addition to its rows.

    Of short batches 16 are up to several times as quick together, each operation being begun once for all of them; of long
    ones, whose attention has no kernel for replicas, one after the other is up to three times as quick. What counts is the work
    in a batch, and no clock: how many go together changes the last bits, which are to be the same every time.
    """
    size, rows = sum(weight.numel() for weight in run.model.parameters()), run.rows[0][: run.how.batch_size]
    positions = len(rows) * max(run.examples.sizes[row] for row in rows) + beside
    short = 6 * size * positions <= SHORT.get(run.device.type, 0)
    return max(1, min(count, SIDE_BY_SIDE, WEIGHTS // size)) if short else 1


def announce(run: Run, trainings: int, steps: float, side: int, disk_bytes: float, lesson: Lesson | None = None) -> None:
    """Say what trainings will take that have `steps` steps in all and go `side` at a time; takes a step to measure it."""
    states = run.start()[None].expand(side, -1, -1)
    step = functools.partial(repeat_steps, run, states, range(1), lambda steps: None, lesson=lesson)
    step()  # what is done once, such as the choice of kernels
    clock = time.process_time if run.device.type == "cpu" else time.perf_counter  # others may be at work on the processor
    began = clock()
    float(step().sum())  # which waits for the device
    minutes = max(1, round(steps / side * (clock() - began) / 60))
    took = f"{minutes} minute{'s' * (minutes > 1)}"
    memory = side * (2 * run.start().nbytes + run.decay_P.nbytes)  # the states before and after a step, and the gradient
    note(
        f"plan: {trainings} trainings of {len(run)} steps, {side} at a time: about {took} of one processor; weights and "
        f"optimizer of {memory / 1e6:.0f} MB beside the model, {disk_bytes / 1e3:.0f} kB on disk"
    )


def _gradients(
    run: Run, number: int, theta_KP: Tensor, counts_N: Tensor | None, lesson: Lesson | None
) -> tuple[Tensor, Tensor]:
    """Of a step's loss, `[K, P]`, with the loss, `[K]`."""
    at_KP = theta_KP.detach().requires_grad_()
    total_KP, found_K = torch.zeros_like(theta_KP), theta_KP.new_zeros(len(theta_KP))
    for place, (rows, batch, share) in enumerate(run.batches(number)):
        with torch.enable_grad():
            losses_KB = side_by_side(run, at_KP, run.task.losses, batch)
            if counts_N is not None:
                losses_KB = losses_KB * counts_N[..., rows].to(losses_KB)
            losses_K = losses_KB.sum(1)
            if lesson is not None and not place:  # a step may take its gradient from several batches
                losses_K = losses_K + lesson(at_KP)
        # replicas share no weight, so the gradient of their sum separates into theirs
        total_KP += torch.autograd.grad(share * losses_K.sum(), at_KP)[0]
        found_K += share * losses_K.detach()
    return total_KP, found_K


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
