"""Models that choose one of several classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.errors import UsageError
from whence.tasks.base import Batch
from whence.tasks.measurements import Measurement
from whence.tasks.supervised import predict
from whence.tasks.text import LabelTask
from whence.tasks.tokens import Passage, Tokens, pad, padding_id, report_lengths, row_names, tokenize


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
        return logits.unsqueeze(1), labels.unsqueeze(1)

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Tokenise rows of text; without a tokenizer examples stay as they are."""
        if self.tokenizer is None:
            return rows
        texts = [Passage(row["text"], ()) for row in rows]
        tokens = tokenize(self.tokenizer, texts, self.max_length)
        report_lengths(tokens, [1] * len(tokens), self.max_length, row_names(rows))
        return [LabelledTokens(item, self._label(row)) for item, row in zip(tokens, rows, strict=True)]

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

    def _label(self, row: Mapping[str, Any]) -> int:
        label = row.get("label")
        if label in self.label_names:
            return self.label_names.index(label)
        if isinstance(label, int) or (isinstance(label, str) and not self.label_names and label.isdecimal()):
            return int(label)
        raise UsageError(
            "A row has no label that is known.",
            given=f"label {label!r} of {row['text'][:80]!r}",
            accepted=", ".join(self.label_names) or "the index of a class, from 0",
            fix='name its column, columns={"text": "...", "label": "..."}, and give Classification its label_names',
        )
