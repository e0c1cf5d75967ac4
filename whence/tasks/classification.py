"""Models that choose one of several classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from whence.errors import UsageError
from whence.tasks.base import Batch
from whence.tasks.context import check_context, check_tokens
from whence.tasks.forward import in_mode
from whence.tasks.measurements import IGNORED, Measurement
from whence.tasks.supervised import predict, say_unused, target_of
from whence.tasks.text import LabelTask, check_text
from whence.tasks.tokens import Passage, Tokens, numbered_names, pad, padding_id, report_lengths, row_names, tokenize


@dataclass(frozen=True, eq=False)
class LabelledTokens:
    """A text and the index of its class."""

    tokens: Tokens
    label: int


class Classification(LabelTask):
    """One class per example: cross-entropy of logits `[B, V]` and labels `[B]`.

    Examples are `(input, label)` pairs or mappings of the model's arguments with `labels`. With a tokenizer they are rows
    `{"text": ..., "label": ...}`, where a label is an index or one of `label_names`. `measurement` is what queries ask
    about: the `"logprob"` of their label, its `"loss"`, its `"margin"` (log-odds), or a function of (model, batch).
    """

    def __init__(
        self,
        tokenizer: Any = None,
        label_names: Sequence[str] | None = None,
        max_length: int = 512,
        *,
        measurement: Measurement = "logprob",
    ):
        super().__init__(tokenizer, max_length, measurement)
        self.label_names = list(label_names or [])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model: logits `[B, 1, V]` and labels `[B, 1]`."""
        logits, labels = predict(model, batch)
        labels = class_labels(labels, logits.shape)
        return logits.unsqueeze(1), labels.unsqueeze(1)

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Tokenise rows of text; without a tokenizer examples stay as they are."""
        if self.tokenizer is None:
            return rows
        check_text(rows, type(self).__name__)
        names = row_names(rows)
        labels = [self._label(row, numbered_names(names, [number])) for number, row in enumerate(rows)]
        tokens = tokenize(self.tokenizer, [Passage(row["text"], ()) for row in rows], self.max_length)
        report_lengths(tokens, [1] * len(tokens), self.max_length, names)
        return [LabelledTokens(item, label) for item, label in zip(tokens, labels, strict=True)]

    def examine(self, model: nn.Module, items: Sequence[Any], names: Sequence[str]) -> None:
        """Refuse labels that the model has no class for, of all items that are in memory; and texts that are too long."""
        say_unused(items)
        if self.tokenizer is not None:
            check_tokens(model, self.tokenizer, [[item.tokens.ids] for item in items], names)
            check_context(model, [self.size(item) for item in items], names)
            labels = [item.label for item in items]
        elif isinstance(items, list | tuple | torch.utils.data.TensorDataset):
            labels = [target_of(item) for item in items]
        else:
            return
        device = next(model.parameters()).device
        few = self.collate([items[0]] * 2)  # one row has no statistics of a batch, which some models take
        first = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in few.items()}
        with torch.no_grad(), in_mode(model, training=False):
            logits, _ = predict(model, first)
        try:
            class_labels(torch.utils.data.default_collate(labels), logits.shape)
            return
        except (UsageError, TypeError, ValueError, RuntimeError):
            pass  # whose it is
        for number, label in enumerate(labels):
            class_labels(label, logits.shape, numbered_names(names, [number]))

    def collate(self, items: Sequence[Any]) -> Batch:
        """Batch tokenised rows, or stack tensors."""
        if self.tokenizer is None:
            return super().collate(items)
        ids = [item.tokens.ids for item in items]
        return {
            "input_ids": pad(ids, padding_id(self.tokenizer)),
            "attention_mask": pad([np.ones_like(row) for row in ids], 0),
            "labels": torch.tensor([item.label for item in items]),
        }

    def size(self, item: Any) -> int:
        """Count the tokens of a text; 1 for anything else."""
        return len(item.tokens.ids) if isinstance(item, LabelledTokens) else 1

    def settings(self, **own: Any) -> dict[str, Any]:
        """Name what decides about labels, tokens and measurements."""
        return super().settings(label_names=self.label_names, **own)

    def display(self, item: LabelledTokens) -> list[tuple[str, bool]]:
        """Return each token's characters; none is in the loss, which is about the label."""
        return item.tokens.display()

    def _label(self, row: Mapping[str, Any], name: str) -> int:
        label = row.get("label")
        if "text" not in row:
            raise UsageError(
                f"A classifier reads rows of text and label, and {name} has no text.",
                given=f"a row with {', '.join(row)}",
                fix='name the columns: columns={"text": "...", "label": "..."} (-c text=COLUMN -c label=COLUMN)',
            )
        if label in self.label_names:
            return self.label_names.index(label)
        as_text = isinstance(label, str) and not self.label_names and label.isdecimal()
        index = int(label) if isinstance(label, int) or as_text else -1  # type: ignore[arg-type]
        if 0 <= index < (len(self.label_names) or index + 1):
            return index
        raise UsageError(
            f"A row has no label that is known: {name}.",
            given=f"label {label!r} of {row['text'][:80]!r}",
            accepted=", ".join(self.label_names) or "the index of a class, from 0",
            fix='name its column, columns={"text": "...", "label": "..."}, and give Classification its label_names',
        )


def class_labels(labels: Any, logits: Sequence[int], name: str | None = None) -> Tensor:
    """The indices of classes, int64 `[B]`; raises `UsageError` for anything that is none of logits of this shape `[B, V]`.

    With a `name` the labels are the one of that example.
    """
    whose = f"the label of {name} is" if name else "the labels of a batch are"
    if len(logits) != 2 or logits[1] < 2:
        raise UsageError(
            "The model's output is not one number per class and example.",
            given=f"outputs of shape {tuple(logits)}",
            accepted="(examples, classes), with two classes or more",
            fix="a last layer with one output per class; for numbers to be predicted, whence.Regression()",
        )
    accepted = f"an index from 0 to {logits[1] - 1}, as an integer (or {IGNORED}: not in the loss)"
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"A class is given by its index, and {whose} something else.",
            given=f"{labels!r}"[:80],
            accepted=accepted,
            fix="names.index(label) for each example; texts with named labels: whence.Classification(tokenizer, names)",
        ) from None
    if found.dim() == (1 if name else 2) and found.shape[-1] == 1:
        found = found.squeeze(-1)
    if found.dim() != (0 if name else 1):
        raise UsageError(
            f"There is one class per example, and {whose} of shape {tuple(found.shape)}.",
            given=f"{found.flatten()[:8].tolist()}",
            accepted=accepted,
            fix="of labels that are 1 at the class and 0 elsewhere: labels.argmax(-1)",
        )
    if found.is_floating_point() or found.is_complex():
        raise UsageError(
            f"A class is given by its index, and {whose} {str(found.dtype).removeprefix('torch.')}.",
            given=f"{found.flatten()[:8].tolist()}",
            accepted=accepted,
            fix="labels.long(); for numbers to be predicted, whence.Regression()",
        )
    found = found.long()
    strange = ((found < 0) | (found >= logits[1])) & (found != IGNORED)
    if not isinstance(strange, FakeTensor) and strange.any():  # a plan's labels have no numbers
        raise UsageError(
            f"The model has {logits[1]} classes, and {whose} {found[strange].flatten()[0].item()}.",
            given=f"{found.flatten()[:8].tolist()}",
            accepted=accepted,
            fix="a model with more classes (num_labels), or labels that begin at 0",
        )
    return found
