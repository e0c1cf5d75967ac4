"""How the weights where a training ended depend on those where it began, as an operator on gradients at its end.

With curvature `h`, loss scale `s` and learning rates that sum to `T`, `x = T h / s + T w` (`whence.methods.course`):

| transport | each eigenvalue | what the training was |
|---|---|---|
| flow | `e^(-x)` | gradient descent that began at the weights before |
| proximal | `1 / (1 + x)` | the minimum of the loss and `alpha / 2 |theta - theta_before|^2`, with `alpha = 1 / T` |
| inverse | `1 / (h + s (w + alpha))` | the same without its factor of alpha, as was published (for comparison) |
| identity | 1 | so short that it moved nothing |

Flow is of Bae et al. 2024 (SOURCE), section 3, proximal of Chen et al. 2020, inverse of Bao et al. 2025, eq. 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from whence.errors import UsageError
from whence.methods.course import Course
from whence.operators import BlockDiagonal, Identity, Operator, Spectral
from whence.stages.stage import Stage


def transport(stage: Stage, curvature: BlockDiagonal | Spectral) -> Operator:
    """What `stage` does to a gradient at its end on the way to its beginning, over the modules of its curvature.

    Raises UsageError where its learning rates are not known, or how its optimizer moved the weights.
    """
    if isinstance(stage.transport, Operator):
        return stage.transport
    if stage.transport == "identity":
        return Identity(curvature.names, f"identity through {stage.name}")
    course = course_of(stage)
    function = {"flow": lambda x: torch.exp(-x), "proximal": lambda x: (1 + x).reciprocal()}.get(stage.transport)
    how = f"{stage.transport} through {stage.name}, {described(stage, course)}"
    if isinstance(curvature, Spectral):
        return _of_all_modules(curvature, course, function, how)
    blocks = {}
    for name, block in curvature.blocks.items():
        pull_OI, x_OI = course.pull(name, block)
        blocks[name] = replace(block, lam_OI=function(x_OI) if function else pull_OI / (1 + x_OI))
    return BlockDiagonal(blocks, how)


def course_of(stage: Stage) -> Course:
    """What is known of the stage's steps: those of its training, or of gradient descent."""
    training, alpha = stage.training, stage.proximal if stage.transport != "flow" else None
    if training is not None and alpha is None:
        rates = float(training.learning_rates.sum())
        return Course.of(training, rates, training.checkpoints[-1:], stage.point, stage.names)
    if alpha is None and stage.rates is None:
        raise UsageError(
            f"The transport through {stage.name} needs to know how far its training went",
            given="no training, and no sum of learning rates",
            accepted="a folder of whence train, a trainer_state.json, or the sum of the learning rates",
            fix=f'Stage("{stage.name}", ..., training=read_training(FOLDER)), or rates=steps * learning_rate',
        )
    if training is not None:
        return Course(1 / alpha, training.loss_scale, training.descent().weight_decay)  # type: ignore[operator]
    examples = stage.point.examples
    scale = sum(stage.point.task.predictions(examples.items[row]) for row in examples.usable) / len(examples.usable)
    return Course(1 / alpha if alpha is not None else stage.rates, scale)  # type: ignore[arg-type]


def described(stage: Stage, course: Course) -> str:
    """How far the training went, in words."""
    if stage.transport == "flow":
        return f"learning rates of {course.rates:.3g} together" + " in the metric of Adam" * (course.metric is not None)
    return f"alpha {1 / course.rates:.3g}" + " in the metric of Adam" * (course.metric is not None)


def _of_all_modules(curvature: Spectral, course: Course, function: Callable[[Tensor], Tensor] | None, how: str) -> Operator:
    """The same where modules interact: with `D` the metric of Adam, `D^1/2 f(D^-1/2 H D^-1/2) D^-1/2`."""

    def decay(lam_P: Tensor) -> Tensor:
        return course.rates * (lam_P.clamp(min=0) / course.loss_scale + course.weight_decay)

    def pulled(lam_P: Tensor) -> Tensor:
        return course.rates / course.loss_scale / (1 + decay(lam_P))

    def value(lam_P: Tensor) -> Tensor:
        return function(decay(lam_P)) if function else pulled(lam_P)

    if course.metric is None:
        return replace(curvature.apply(value), label=how)
    down = course.metric.apply(torch.rsqrt, "to the power -1/2")
    up = course.metric.apply(torch.sqrt, "to the power 1/2") if function else down
    return up @ replace(curvature.between(down).apply(value), label=how) @ down
