"""Models that predict numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.errors import UsageError
from whence.tasks.base import Batch, Task
from whence.tasks.measurements import full_precision, measurement_name
from whence.tasks.outputs import Outputs
from whence.tasks.supervised import predict, say_unused, target_of


class Regression(Task):
    """Numbers with Gaussian noise of unit variance: `1/2 sum_o (prediction_o - target_o)^2`.

    This is the negative log-likelihood up to a constant, so the Fisher is the Gauss-Newton matrix (`signs` says how it is
    drawn from). Examples are
    `(input, target)` pairs or mappings of the model's arguments with `labels`. Queries ask about the log-likelihood of
    their target, or about what `measurement`, a function of (model, batch), returns.
    """

    likelihood = "at most 0"

    def __init__(self, *, measurement: Callable[[nn.Module, Batch], Tensor] | None = None):
        self.measurement = measurement

    def examine(self, model: nn.Module, items: Sequence[Any], names: Sequence[str]) -> None:
        """Note what of the examples the loss doesn't read."""
        say_unused(items)

    def losses(self, model: nn.Module, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Return half the squared error, `[B]`; with `noise [B, ...]` that of targets one above or below the prediction."""
        prediction, target = predict(model, batch)
        target = _matching(target, prediction)
        prediction = full_precision(prediction).flatten(1) if prediction.dim() > 1 else full_precision(prediction)[:, None]
        target = target.to(prediction).reshape(prediction.shape)
        if noise is not None:
            target = prediction.detach() + signs(noise).to(prediction).reshape(prediction.shape)
        return (prediction - target).square().sum(1) / 2

    def measurements(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the measurement of each query, `[B]`."""
        return -self.losses(model, batch) if self.measurement is None else self.measurement(model, batch)

    def margins(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the one prediction of each example, and how far its target is above that: `[B]` both."""
        found = self.outputs(model, batch)
        if found.h_BTV.shape[-1] > 1:
            return super().margins(model, batch)  # raises
        prediction = found.h_BTV[:, 0, 0]
        return prediction, (found.labels[:, 0, 0] - prediction).detach()

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return the predictions."""
        prediction, target = predict(model, batch)
        target = _matching(target, prediction)
        h_BV = full_precision(prediction).flatten(1) if prediction.dim() > 1 else full_precision(prediction)[:, None]
        return Outputs(h_BV[:, None], target.to(h_BV).reshape(h_BV[:, None].shape), "gaussian")

    def noise_shape(self, item: Any) -> tuple[int, ...]:
        """Return the shape of the target: one number for each output."""
        return tuple(np.shape(target_of(item)))

    def settings(self) -> dict[str, Any]:
        """Name what decides about the measurement."""
        name = "logprob" if self.measurement is None else measurement_name(self.measurement)
        return {"task": type(self).__name__, "measurement": name}


def _matching(target: Any, prediction: Tensor) -> Tensor:
    """The targets, one for each prediction; raises `UsageError` for others. Axes of one entry don't count."""
    numbers = isinstance(target, Tensor)
    if numbers and [size for size in target.shape[1:] if size > 1] == [size for size in prediction.shape[1:] if size > 1]:
        return target
    raise UsageError(
        "The targets are not of the predictions' shape.",
        given=f"targets of shape {tuple(target.shape)}" if numbers else f"targets such as {target!r}"[:80],
        accepted=f"one number for each of the model's outputs, which are of shape {tuple(prediction.shape)}",
        fix="a model with as many outputs as targets; for classes, whence.Classification()",
    )


def signs(noise: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into -1 or 1.

    As noise of a target they have the mean and variance of a standard normal distribution, so that the gradients'
    covariance is the Gauss-Newton matrix all the same; their squares don't vary, so that it needs fewer draws (Hutchinson
    1990), and none for a single output: its squared gradient is the same for either sign.
    """
    return torch.where(noise < 0.5, -1.0, 1.0)
