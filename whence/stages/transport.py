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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whence.errors import UsageError
from whence.gradients import Gradient, Gradients
from whence.methods.course import Course
from whence.operators import BlockDiagonal, Identity, Operator, Spectral, Streaming
from whence.stages.stage import Stage
from whence.train.state import predictions_per_row


def transport(stage: Stage, curvature: BlockDiagonal | Spectral, frozen: Sequence[str] = ()) -> Operator:
    """What `stage` does to a gradient at its end on the way to its beginning, over the modules of its curvature.

    Modules that are `frozen`, which it left as they were, pass everything on. Raises UsageError where its learning rates are
    not known, or how its optimizer moved the weights.
    """
    if isinstance(stage.transport, Operator):
        return stage.transport
    moved = [name for name in curvature.names if name not in frozen]
    if stage.transport == "identity" or not moved:
        how = "identity" if stage.transport == "identity" else "nothing moved"
        return Identity((*moved, *frozen), f"{how} through {stage.name}")
    course = course_of(stage, moved)
    function = {"flow": lambda x: torch.exp(-x), "proximal": lambda x: (1 + x).reciprocal()}.get(stage.transport)
    how = f"{stage.transport} through {stage.name}, {described(stage, course)}"
    if isinstance(curvature, Spectral):
        passed = _of_all_modules(curvature.only(moved), course, function, how)
    else:
        blocks = {}
        for name in moved:
            pull_OI, x_OI = course.pull(name, block := curvature.blocks[name])
            blocks[name] = replace(block, lam_OI=function(x_OI) if function else pull_OI / (1 + x_OI))
        passed = BlockDiagonal(blocks, how)
    return Beside(passed, frozen) if frozen else passed


def course_of(stage: Stage, names: Sequence[str]) -> Course:
    """What is known of the steps that moved these modules: those of the stage's training, or of gradient descent."""
    training, alpha = stage.training, stage.proximal if stage.transport != "flow" else None
    if training is not None and alpha is None:
        rates = float(training.learning_rates.sum())
        return Course.of(training, rates, training.checkpoints[-1:], stage.point, names)
    if alpha is None and stage.rates is None:
        raise UsageError(
            f"The transport through {stage.name} needs to know how far its training went",
            given="no training, and no sum of learning rates",
            accepted="a folder of whence train, a trainer_state.json, or the sum of the learning rates",
            fix=f'Stage("{stage.name}", ..., training=read_training(FOLDER)), read_state(CHECKPOINT, point), or rates=SUM',
        )
    if training is not None:
        return Course(1 / alpha, training.loss_scale, training.descent().weight_decay)  # type: ignore[operator]
    scale = predictions_per_row(stage.point)
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


class Beside(Operator):
    """An operator on its own modules, and modules beside them as they are."""

    def __init__(self, operator: Operator, beside: Sequence[str]):
        self.operator, self.beside = operator, tuple(beside)
        self.names = (*operator.names, *(name for name in beside if name not in operator.names))
        self.label = f"{operator.label}; {len(self.beside)} modules as they were"

    @property
    def about(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The operator's."""
        return self.operator.about

    @property
    def reads(self) -> tuple[str, ...]:
        """What the operator does, and the modules beside it."""
        return (*self.operator.reads, *(name for name in self.beside if name not in self.operator.reads))

    @property
    def blockwise(self) -> bool:
        """Whether the operator is."""
        return self.operator.blockwise

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply the operator to the gradients of its modules."""
        return {**self.operator.apply_to(gradients), **{name: gradients[name] for name in self.beside if name in gradients}}

    def identity(self) -> Any:
        """The operator's, and what is beside it."""
        return {"beside": list(self.beside), "of": self.operator.identity()}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """The same, module by module."""
        return _StreamingBeside(self, like)


class _StreamingBeside(Streaming):
    def __init__(self, whole: Beside, like: Tensor | None):
        self.beside, self.inner, self.same = whole.beside, whole.operator.streaming(like), Identity().streaming(like)

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        return (self.same if name in self.beside else self.inner).apply(name, gradient, readers)
