"""What whence has to know about a model's job: two methods, `losses` and `measurements`.

Everything else here has a default that fits tensors in batches; `CausalLM` and its kin override it for text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from whence.errors import UsageError

if TYPE_CHECKING:
    from whence.tasks.outputs import Outputs

Batch = Mapping[str, Any]
"""What `collate` returns and the model's job reads; tensors in it are moved to the model's device."""


class Task:
    """How a model is trained, and what is asked of it.

    A task of your own implements `losses` (and `measurements`, if the question is not "why this loss?"). Both return
    one number per example, so that the gradient of their sum separates into examples. Batch statistics
    (BatchNorm in training mode) would mix them, so the model runs in evaluation mode.
    """

    default_modules: str = "all"
    """The selector used when the user names no modules."""
    likelihood: Literal["probability", "at most 0"] | None = None
    """What the log-likelihood is known to be: the logarithm of a probability, or a number that ends at 0."""

    def losses(self, model: nn.Module, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """The training loss of each example, `[B]`: its negative log-likelihood in nats, summed over its tokens.

        `noise` is None for the data's own labels. Otherwise it holds uniform numbers in [0, 1), one per prediction
        and of the shape that `noise_shape` gives, padded as the batch is: draw labels from the model's own predictive
        distribution with them (`sample_classes`), which makes the covariance of the gradients the true Fisher,
        instead of the empirical one. A task that draws none is recorded as what it is then, the empirical one.
        """
        raise UsageError(
            f"{type(self).__name__} has no losses.", accepted="losses(model, batch, noise=None): one number per example, [B]"
        )

    def measurements(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is asked about each query, `[B]`: by default the log-likelihood of its labels, in nats."""
        losses = self.losses(model, batch)
        return -losses if isinstance(losses, Tensor) and losses.is_floating_point() else losses  # that is refused

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """What the loss is a function of, for exact curvature; raises UsageError where it is not known."""
        raise UsageError(
            "The outputs of this task are not known, which the Gauss-Newton matrix and the Hessian are made from.",
            given=type(self).__name__,
            accepted="CausalLM, Seq2Seq, Classification, Regression, or a task with a method `outputs`",
        )

    def margins(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The margin of each example, `[B]`, and the slope of its log-likelihood in that, without a gradient, `[B]`.

        The margin is what a generalised linear model is linear in: of classes the log-odds `f = log p / (1 - p)` of the label,
        where the slope is `1 - p` (Park et al. 2023, section 3.2 and eq. 13). Raises UsageError where it is not known.
        """
        raise UsageError(
            "The margins of this task are not known, which TRAK is made from.",
            given=type(self).__name__,
            accepted="CausalLM, Seq2Seq, Classification, Regression with one output, or a task with a method `margins`",
        )

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Turn rows of the data into items that `collate` can batch; the default leaves them as they are."""
        return rows

    def encode_queries(self, rows: Sequence[Any]) -> list[list[tuple[Any, float]]]:
        """Turn each query into weighted items; its measurement is their weighted sum (a contrast is +1 and -1)."""
        return [[(item, 1.0)] for item in self.encode(rows)]

    def examine(self, model: nn.Module, items: Sequence[Any], names: Sequence[str]) -> None:
        """Raise UsageError where encoded items don't suit the model, before anything is computed; `names` are the rows'."""

    def collate(self, items: Sequence[Any]) -> Batch:
        """Batch items; the default stacks tensors as `torch.utils.data.default_collate` does."""
        try:
            batch = torch.utils.data.default_collate(list(items))
        except (TypeError, RuntimeError) as error:
            raise UsageError(
                "Examples can't be put into one batch.",
                given=str(error).splitlines()[0],
                accepted="tensors, arrays and numbers, each of one shape in all examples",
                fix="give them one shape (and a target each), or a task of your own with a method `collate`",
            ) from error
        if isinstance(batch, Mapping):
            return batch
        parts = batch if isinstance(batch, list | tuple) else [batch]
        return dict(zip(["inputs", "targets", *(f"field_{i}" for i in range(2, len(parts)))], parts, strict=False))

    def size(self, item: Any) -> int:
        """Positions that the item takes up in a batch (tokens of a text, 1 for a vector or an image)."""
        return 1

    def predictions(self, item: Any) -> int:
        """Predictions that the item's loss adds up: tokens in the loss of a text, 1 for a class."""
        return 1

    def positions(self, batch: Batch) -> Tensor | None:
        """Which positions `[B, T]` of a batch per-token scores speak of; None where examples are no sequences."""
        return batch.get("attention_mask")

    def predicted_tokens(self, item: Any) -> list[str] | None:
        """The text that each of an item's positions predicts, `[T]`, for scores per token; None where items are no text."""
        return None

    def noise_shape(self, item: Any) -> tuple[int, ...]:
        """Shape of the uniform noise that drawing labels for the item takes: one number per prediction."""
        return ()

    def collate_noise(self, items: Sequence[Any], noise: Sequence[Tensor]) -> Tensor:
        """Batch the items' noise in the layout of `collate`."""
        return torch.stack(list(noise))

    def settings(self) -> dict[str, Any]:
        """What of the task changes the scores, for fingerprints: JSON values only."""
        return {"task": type(self).__name__}


def sample_classes(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw a class from softmax(logits `[..., V]`) by inverting its distribution function at `noise [...]`.

    The draw depends on the noise alone, never on the batch: a row has the same labels whatever it is batched with.
    """
    cumulative = torch.softmax(logits.detach(), dim=-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, (noise.to(cumulative) * cumulative[..., -1]).unsqueeze(-1), right=True)
    return drawn.squeeze(-1).clamp(max=logits.shape[-1] - 1)
