"""Encoder-decoder models such as T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from whence.errors import TruncatedQueryError, UsageError
from whence.store.fingerprint import fingerprint_tokenizer
from whence.tasks.base import Batch, Task
from whence.tasks.forward import unwrapped
from whence.tasks.measurements import (
    IGNORED,
    NAMED,
    Measurement,
    check_measurement,
    draw_labels,
    measurement_name,
    negative_log_likelihood,
)
from whence.tasks.outputs import Outputs, classes
from whence.tasks.questions import answer_of, span_in_answer, variants
from whence.tasks.tokens import Passage, Tokens, pad, padding_id, report_lengths, row_names, tokenize


@dataclass(frozen=True, eq=False)
class TokenPair:
    """What the encoder reads and what the decoder writes."""

    source: Tokens
    target: Tokens


class Seq2Seq(Task):
    """The completion, written by the decoder, of a prompt, read by the encoder; `T` positions are the decoder's.

    Losses, measurements and labels drawn from the model are those of `CausalLM`. Every token of the completion is in the
    loss. Source and target may each have `max_length` tokens. The model makes its decoder's inputs from the data's labels,
    also when labels are drawn.
    """

    default_modules = "mlp"

    def __init__(
        self, tokenizer: Any, max_length: int = 512, *, measurement: Measurement = "logprob", append_eos: bool = False
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.measurement = check_measurement(measurement)
        self.append_eos = append_eos

    def losses(self, model: nn.Module, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of each completion, or of labels drawn with `noise [B, T]`: `[B]`, nats."""
        logits, labels = _decode(model, batch), batch["labels"]
        if noise is not None:
            labels = draw_labels(logits, labels, noise)
        return negative_log_likelihood(logits, labels)

    def measurements(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the measurement of each query, `[B]`."""
        if not isinstance(self.measurement, str):
            return self.measurement(model, batch)
        return NAMED[self.measurement](_decode(model, batch), batch["labels"])

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return the decoder's logits."""
        return classes(_decode(model, batch), batch["labels"])

    def encode(self, rows: Sequence[Any]) -> list[TokenPair]:
        """Tokenise rows of prompt and completion; notes what is cut and what has no completion."""
        sources = tokenize(self.tokenizer, [Passage(_prompt_of(row), ()) for row in rows], self.max_length)
        answers = [answer_of(row) for row in rows]
        targets = self._tokenize_targets([Passage(text, ((0, len(text) + 1),)) for text in answers])
        longer = [max(pair, key=lambda tokens: tokens.length) for pair in zip(sources, targets, strict=True)]
        report_lengths(longer, [int(item.in_loss.sum()) for item in targets], self.max_length, row_names(rows))
        return [TokenPair(source, target) for source, target in zip(sources, targets, strict=True)]

    def encode_queries(self, rows: Sequence[Any]) -> list[list[tuple[TokenPair, float]]]:
        """Tokenise queries; a span and a contrast mean what they do in `CausalLM`."""
        return [
            [(self._encode_query(row, name), weight) for row, weight in variants(query)]
            for name, query in zip(row_names(rows), rows, strict=True)
        ]

    def collate(self, items: Sequence[TokenPair]) -> Batch:
        """Batch items: `input_ids` and `attention_mask` of the encoder, `[B, S]`, `labels` of the decoder, `[B, T]`.

        `decoder_labels` are the tokens that the decoder has written, `labels` those that are in the loss, or -100.
        """
        fill = padding_id(self.tokenizer)
        sources = [item.source.ids for item in items]
        sizes = [_written(item) for item in items]
        targets = [item.target.ids[:size] for item, size in zip(items, sizes, strict=True)]
        labels = [
            np.where(item.target.in_loss, item.target.ids, IGNORED)[:size] for item, size in zip(items, sizes, strict=True)
        ]
        return {
            "input_ids": pad(sources, fill),
            "attention_mask": pad([np.ones_like(row) for row in sources], 0),
            "decoder_labels": pad(targets, IGNORED),
            "labels": pad(labels, IGNORED),
        }

    def size(self, item: TokenPair) -> int:
        """Count the positions of the encoder or the decoder, whichever has more; 0 if nothing is in the loss."""
        return max(len(item.source.ids), _written(item)) if _written(item) else 0

    def predictions(self, item: TokenPair) -> int:
        """Count the tokens in the loss."""
        return int(item.target.in_loss.sum())

    def positions(self, batch: Batch) -> Tensor:
        """Return which positions `[B, T]` of the decoder are real: per-token scores speak of them."""
        return batch["decoder_labels"] != IGNORED

    def noise_shape(self, item: TokenPair) -> tuple[int, ...]:
        """Return `(T,)`: one number for each position of the decoder."""
        return (_written(item),)

    def collate_noise(self, items: Sequence[TokenPair], noise: Sequence[Tensor]) -> Tensor:
        """Batch the items' noise, padded as the labels are: `[B, T]`."""
        return pad([row.numpy(force=True) for row in noise], 0.0)

    def settings(self) -> dict[str, Any]:
        """Name what decides about tokens, losses and measurements."""
        return {
            "task": type(self).__name__,
            "tokenizer": fingerprint_tokenizer(self.tokenizer),
            "max_length": self.max_length,
            "append_eos": self.append_eos,
            "measurement": measurement_name(self.measurement),
        }

    def display(self, item: TokenPair) -> list[tuple[str, bool]]:
        """Return each token's characters, of the prompt and then of the completion, and whether it is in the loss."""
        return item.source.display() + item.target.display()

    def predicted_tokens(self, item: TokenPair) -> list[str]:
        """Return the characters of the token that each of the decoder's `T` positions predicts."""
        return item.target.pieces[: _written(item)]

    def _encode_query(self, row: Mapping[str, Any], name: str) -> TokenPair:
        answer = answer_of(row)
        stretch = span_in_answer(row) if "span" in row else (0, len(answer) + 1)
        (source,) = tokenize(self.tokenizer, [Passage(_prompt_of(row), ())], self.max_length)
        (target,) = self._tokenize_targets([Passage(answer, (stretch,))])
        needed = max(source.length, target.needed)
        if needed > self.max_length:
            raise TruncatedQueryError(
                f"Query {name} is cut off.",
                given=f"max_length={self.max_length}; the query needs {needed:,} tokens",
                accepted=f"max_length of at least {needed}",
                fix=f"max_length={needed}    (command line: --max-length {needed})",
            )
        return TokenPair(source, target)

    def _tokenize_targets(self, passages: Sequence[Passage]) -> list[Tokens]:
        return tokenize(self.tokenizer, passages, self.max_length, append_eos=self.append_eos, target=True)


def _decode(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch: the decoder's logits, `[B, T, V]`."""
    written = unwrapped(model).prepare_decoder_input_ids_from_labels(labels=batch["decoder_labels"])
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=written,
        use_cache=False,
    ).logits


def _written(item: TokenPair) -> int:
    """Count the tokens up to the last one in the loss."""
    positions = item.target.in_loss.nonzero()[0]
    return int(positions[-1]) + 1 if len(positions) else 0


def _prompt_of(row: Mapping[str, Any]) -> str:
    if "prompt" not in row:
        raise UsageError(
            "An encoder-decoder model needs rows of prompt and completion.",
            given=f"a row with {', '.join(row)}",
            fix='name the columns: columns={"prompt": "...", "completion": "..."}',
        )
    return row["prompt"]
