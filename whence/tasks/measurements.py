"""Numbers made from logits and labels, and the measurements that are asked for by name.

`B` examples, `T` positions, `V` classes. A label of -100 is in no sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from whence.errors import UsageError
from whence.tasks.base import Batch, sample_classes

IGNORED = -100

Measurement = str | Callable[[nn.Module, Batch], Tensor]
"""`"logprob"`, `"loss"`, `"margin"`, or a function of the model and a batch that returns one number per query, `[B]`."""


def full_precision(numbers: Tensor) -> Tensor:
    """Return the tensor in float32 at least; float64 stays."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-sum_t log p(label_t)` in nats, `[B]`, for logits `[B, T, V]` and labels `[B, T]`."""
    losses = nn.functional.cross_entropy(
        full_precision(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape).sum(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `sum_t logit[label_t] - logsumexp(other logits)`, `[B]`: the log-odds of the labels.

    Park et al. 2023 (TRAK) ask about this, since unlike the log-probability it doesn't level off for confident models.
    """
    return log_odds(logits, labels).sum(1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `log p / (1 - p)` of each label, `[B, T]`, zero where there is none."""
    logits, counted = full_precision(logits), labels != IGNORED
    index = labels.clamp(min=0).unsqueeze(-1)
    correct = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return torch.where(counted, correct - others, 0.0)


def draw_labels(logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Draw labels `[B, T]` from the model's own distribution wherever the data has one."""
    return torch.where(labels == IGNORED, labels, sample_classes(full_precision(logits), noise))


NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logprob": lambda logits, labels: -negative_log_likelihood(logits, labels),
    "loss": negative_log_likelihood,
    "margin": margin,
}


def check_measurement(measurement: Measurement) -> Measurement:
    """Return the measurement; raises `UsageError` if there is none of this name."""
    if not callable(measurement) and measurement not in NAMED:
        raise UsageError(
            "There is no such measurement.",
            given=repr(measurement),
            accepted=", ".join(NAMED) + ", or a function of (model, batch) that returns one number per query",
        )
    return measurement


def measurement_name(measurement: Measurement) -> str:
    """Say what the measurement is called in fingerprints: its name, or where its function is defined."""
    if isinstance(measurement, str):
        return measurement
    function = measurement if hasattr(measurement, "__qualname__") else type(measurement)
    return f"{function.__module__}.{function.__qualname__}"
