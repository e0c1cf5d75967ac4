"""What tasks whose labels are classes or tokens have in common: losses, measurements and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whence.errors import TruncatedQueryError, UsageError
from whence.settings import Length, valid
from whence.store.fingerprint import fingerprint_tokenizer
from whence.tasks.base import Batch, Task
from whence.tasks.context import check_context, check_tokens
from whence.tasks.forward import check_logits
from whence.tasks.measurements import (
    IGNORED,
    NAMED,
    Measurement,
    check_measurement,
    draw_labels,
    log_odds,
    measurement_name,
    negative_log_likelihood,
)
from whence.tasks.outputs import Outputs, classes
from whence.tasks.questions import variants
from whence.tasks.tokens import Tokens, numbered_names, pad, row_names


def check_text(rows: Sequence[Any], task: str) -> None:
    """Raise `UsageError` unless the rows are text."""
    strange = [
        n for n, row in enumerate(rows) if not (isinstance(row, Mapping) and row.keys() & {"text", "prompt", "messages"})
    ]
    if strange:
        row = rows[strange[0]]
        raise UsageError(
            f"{task} with a tokenizer reads rows of text, and {numbered_names(row_names(rows), strange)} have none.",
            given=f"a mapping with {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}",
            accepted='{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]}; whence tokenises',
            fix="of token ids, the text: tokenizer.batch_decode(ids)",
        )


def check_answers(rows: Sequence[Any]) -> None:
    """Raise `UsageError` where training rows have a prompt but no completion, and so nothing that could be trained on."""
    silent = [n for n, row in enumerate(rows) if "prompt" in row and "completion" not in row]
    if silent:
        raise UsageError(
            f"{len(silent):,} of {len(rows):,} training rows have a prompt but no completion: "
            f"{numbered_names(row_names(rows), silent)}.",
            given=repr(rows[silent[0]]["prompt"][:200]),
            accepted="a completion in every row; an empty one has nothing in the loss",
            fix="leave these rows out, or name the column: --columns prompt=COLUMN --columns completion=COLUMN",
            code=22,
        )


class LabelTask(Task):
    """Cross-entropy of labels; a subclass gives the logits."""

    likelihood = "probability"

    def __init__(self, tokenizer: Any, max_length: int, measurement: Measurement):
        self.tokenizer = tokenizer
        self.max_length = valid(Length, max_length, "max_length")
        self.measurement = check_measurement(measurement)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model: logits `[B, T, V]` and labels `[B, T]`, -100 where none is in the loss."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of each example's labels, or of labels drawn with `noise`: `[B]`, nats."""
        return self._measured(model, batch, negative_log_likelihood, noise)

    def measurements(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the measurement of each query, `[B]`."""
        if not isinstance(self.measurement, str):
            return self.measurement(model, batch)
        return self._measured(model, batch, NAMED[self.measurement])

    def margins(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the log-odds of each example's labels, added up, and the mean of `1 - p` over these: `[B]` both."""
        totals: list[tuple[Tensor, Tensor]] = []  # of each part that the labels are measured in

        def measure(logits: Tensor, labels: Tensor) -> Tensor:
            odds, counted = log_odds(logits, labels), labels != IGNORED
            doubts = torch.where(counted, torch.sigmoid(-odds.detach()), 0.0)
            totals.append((doubts.sum(1), counted.sum(1)))
            return odds.sum(1)

        margins = self._measured(model, batch, measure)
        doubts, counts = (torch.stack(parts).sum(0) for parts in zip(*totals, strict=True))
        return margins, doubts / counts.clamp(min=1)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return the logits of all labels at once."""
        return classes(*self.predict(model, batch))

    def settings(self, **own: Any) -> dict[str, Any]:
        """Name what decides about labels, tokens, losses and measurements; `own` is a subclass's."""
        return {
            "task": type(self).__name__,
            "tokenizer": self.tokenizer and fingerprint_tokenizer(self.tokenizer),
            "max_length": self.max_length,
            **own,
            "measurement": measurement_name(self.measurement),
        }

    def _measured(
        self, model: nn.Module, batch: Batch, measure: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None = None
    ) -> Tensor:
        """What `measure` makes of logits and labels, `[B]`; with noise, of labels that are drawn from the model."""
        logits, labels = self.predict(model, batch)
        check_logits(logits, model)
        return measure(logits, labels if noise is None else draw_labels(logits, labels, noise.reshape(labels.shape)))


class TextTask(LabelTask):
    """Language models: labels are tokens, and queries may ask about a span or a contrast of their completion."""

    default_modules = "mlp"
    padding_side: Literal["right", "left"] = "right"

    def __init__(self, tokenizer: Any, max_length: int, measurement: Measurement, append_eos: bool):
        super().__init__(tokenizer, max_length, measurement)
        if append_eos and tokenizer.eos_token_id is None:
            raise UsageError(
                "Rows can't end with the end-of-sequence token: this tokenizer has none.",
                given=f"append_eos and a {type(tokenizer).__name__} without eos_token",
                accepted="a tokenizer with an eos_token",
                fix="leave out --append-eos, or name the token: tokenizer.eos_token = '</s>' before tokenizer.save_pretrained",
            )
        self.append_eos = valid(bool, append_eos, "append_eos")

    def encode_queries(self, rows: Sequence[Any]) -> list[list[tuple[Any, float]]]:
        """Tokenise queries: in the loss is what is measured, the completion (of a conversation: its last turn) or its span.

        A query with a contrast is two items, weighted +1 and -1. Raises `UsageError` for a query without completion,
        `TruncatedQueryError` when the completion doesn't fit.
        """
        return [
            [(self._encode_query(row, name), weight) for row, weight in variants(query)]
            for name, query in zip(row_names(rows), rows, strict=True)
        ]

    def examine(self, model: nn.Module, items: Sequence[Any], names: Sequence[str]) -> None:
        """Refuse items for which the model has no tokens or positions; note those beyond the length that it was made for."""
        check_tokens(model, self.tokenizer, [[text.ids for text in self.texts(item)] for item in items], names)
        check_context(model, [self.size(item) for item in items], names)

    def texts(self, item: Any) -> list[Tokens]:
        """Return the texts of an encoded item."""
        return [item]

    def _encode_query(self, row: Mapping[str, Any], name: str) -> Any:
        raise NotImplementedError

    def collate_noise(self, items: Sequence[Any], noise: Sequence[Tensor]) -> Tensor:
        """Batch the items' noise, padded as the labels are: `[B, T]`."""
        return pad([row.numpy(force=True) for row in noise], 0.0, self.padding_side)

    def settings(self, **own: Any) -> dict[str, Any]:
        """Name what decides about tokens, losses and measurements (the padding doesn't)."""
        return super().settings(**own, append_eos=self.append_eos)

    def _refuse_cut(self, needed: int, what: str, given: str) -> None:
        """Raise `TruncatedQueryError` where a query needs more tokens than there may be."""
        if needed > self.max_length:
            raise TruncatedQueryError(
                what,
                given=f"max_length={self.max_length}; {given}",
                accepted=f"max_length of at least {needed}",
                fix=f"max_length={needed}    (command line: --max-length {needed})",
            )
