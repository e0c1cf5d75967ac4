"""What a loss is a function of: a model's outputs, with the loss's first two derivatives in them.

`B` examples, `T` predictions of an example, `V` numbers per prediction: the logits of a token or class, or numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from whence.errors import UsageError
from whence.tasks.base import Batch, Task
from whence.tasks.measurements import IGNORED, full_precision, negative_log_likelihood


@dataclass(frozen=True)
class Outputs:
    """What the model says `h_BTV` of labels: classes `[B, T]`, -100 where none is in the loss, or numbers `[B, T, V]`."""

    h_BTV: Tensor
    labels: Tensor
    family: Literal["softmax", "gaussian"]

    @property
    def counted_BT(self) -> Tensor:
        """Which of the predictions are in the loss."""
        return self.labels != IGNORED if self.family == "softmax" else torch.ones_like(self.labels[..., 0], dtype=torch.bool)

    def losses(self) -> Tensor:
        """Cross-entropy, or half the squared error, summed over predictions: `[B]`."""
        if self.family == "gaussian":
            return (self.h_BTV - self.labels).square().sum((1, 2)) / 2
        return negative_log_likelihood(self.h_BTV, self.labels)

    def divergence(self, target: Outputs) -> Tensor:
        """Bregman divergence of the loss between these outputs and others, `[B]`: the labels have dropped out.

        `KL(p_target || p)` summed over predictions for cross-entropy; half the squared distance for squared error
        (Bae et al. 2022, section 4.1).
        """
        if self.family == "gaussian":
            return (self.h_BTV - target.h_BTV).square().sum((1, 2)) / 2
        q_BTV, moved = target.h_BTV.softmax(-1), self.h_BTV - target.h_BTV
        moved = moved - (q_BTV * moved).sum(-1, keepdim=True)
        excess = (q_BTV * (moved.expm1() - moved)).sum(-1)  # log sum q e^moved, without rounding to 1 first
        return (excess.log1p() * self.counted_BT).sum(1)

    def curve(self, u_BTV: Tensor) -> Tensor:
        """The loss's Hessian with respect to the outputs, times `u` or many of them, `[..., B, T, V]`."""
        if self.family == "gaussian":
            return u_BTV
        p_BTV = self.h_BTV.softmax(-1)
        return p_BTV * (u_BTV - (p_BTV * u_BTV).sum(-1, keepdim=True)) * self.counted_BT[..., None]

    def root(self) -> Tensor:
        """`b` with `b b^T` the loss's Hessian at each prediction, `[B, T, V, V]`: `diag(sqrt p) - p sqrt(p)^T` for softmax."""
        n_v = self.h_BTV.shape[-1]
        eye = torch.eye(n_v).to(self.h_BTV)
        if self.family == "gaussian":
            return eye.expand(*self.h_BTV.shape, n_v)
        p_BTV = self.h_BTV.softmax(-1)
        root = p_BTV.sqrt()
        return (root[..., None] * eye - p_BTV[..., None] * root[..., None, :]) * self.counted_BT[..., None, None]


def classes(logits_BTV: Tensor, labels_BT: Tensor) -> Outputs:
    """Outputs whose loss is cross-entropy, in float32 at least."""
    return Outputs(full_precision(logits_BTV), labels_BT, "softmax")


def check_outputs(task: Task, model: nn.Module, batch: Batch) -> None:
    """Raise UsageError where a task's loss is not that of its outputs, as where a subclass changes one of the two."""
    expected, found = task.losses(model, batch), task.outputs(model, batch).losses()
    if not torch.allclose(found, expected.to(found), rtol=1e-6 if found.dtype == torch.float64 else 1e-3, atol=1e-9):
        raise UsageError(
            "The curvature is known of losses that are cross-entropy or squared error of the task's outputs.",
            given=f"{type(task).__name__}, whose loss is another one",
            accepted="CausalLM, Seq2Seq, Classification, Regression, or a task whose `outputs` give its `losses`",
        )
