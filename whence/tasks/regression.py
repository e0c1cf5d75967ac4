"""Models that predict numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.tasks.base import Batch, Task
from whence.tasks.measurements import full_precision, measurement_name
from whence.tasks.supervised import predict, target_of


class Regression(Task):
    """Numbers with Gaussian noise of unit variance: `1/2 sum_o (prediction_o - target_o)^2`.

    This is the negative log-likelihood up to a constant, so the Fisher is the Gauss-Newton matrix. Examples are
    `(input, target)` pairs or mappings of the model's arguments with `labels`. Queries ask about the log-likelihood of
    their target, or about what `measurement`, a function of (model, batch), returns.
    """

    def __init__(self, *, measurement: Callable[[nn.Module, Batch], Tensor] | None = None):
        self.measurement = measurement

    def losses(self, model: nn.Module, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Return half the squared error, `[B]`; with `noise [B, ...]` that of targets drawn around the prediction."""
        prediction, target = predict(model, batch)
        prediction = full_precision(prediction).flatten(1) if prediction.dim() > 1 else full_precision(prediction)[:, None]
        target = target.to(prediction).reshape(prediction.shape)
        if noise is not None:
            target = prediction.detach() + standard_normal(noise).to(prediction).reshape(prediction.shape)
        return (prediction - target).square().sum(1) / 2

    def measurements(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the measurement of each query, `[B]`."""
        return -self.losses(model, batch) if self.measurement is None else self.measurement(model, batch)

    def noise_shape(self, item: Any) -> tuple[int, ...]:
        """Return the shape of the target: one number for each output."""
        return tuple(np.shape(target_of(item)))

    def settings(self) -> dict[str, Any]:
        """Name what decides about the measurement."""
        name = "logprob" if self.measurement is None else measurement_name(self.measurement)
        return {"task": type(self).__name__, "measurement": name}


def standard_normal(noise: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into draws from a standard normal distribution, float64: its quantiles."""
    smallest = 2.0**-25  # half a step of float32's uniform numbers, where the quantile of 0 would be infinite
    return torch.special.ndtri(noise.double().clamp(min=smallest))
