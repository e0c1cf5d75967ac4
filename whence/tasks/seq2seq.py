"""Encoder-decoder models such as T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from whence.errors import UsageError
from whence.tasks.base import Batch
from whence.tasks.forward import logits_of, unwrapped
from whence.tasks.measurements import IGNORED, Measurement
from whence.tasks.questions import answer_of, span_in_answer
from whence.tasks.text import TextTask, check_answers, check_text
from whence.tasks.tokens import Passage, Tokens, pad, padding_id, report_lengths, row_names, tokenize, up_to_last


@dataclass(frozen=True, eq=False)
class TokenPair:
    """What the encoder reads and what the decoder writes."""

    source: Tokens
    target: Tokens


class Seq2Seq(TextTask):
    """The completion, written by the decoder, of a prompt, read by the encoder; `T` positions are the decoder's.

    Losses, measurements and labels drawn from the model are those of `CausalLM`. Every token of the completion is in the
    loss. Source and target may each have `max_length` tokens. The model makes its decoder's inputs from the data's labels,
    also when labels are drawn.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = 512, *, measurement: Measurement = "logprob", append_eos: bool = False
    ):
        super().__init__(tokenizer, max_length, measurement, append_eos)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model: the decoder's logits `[B, T, V]`, and the labels."""
        logits = logits_of(
            model,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=unwrapped(model).prepare_decoder_input_ids_from_labels(labels=batch["decoder_labels"]),
            use_cache=False,
        )
        return logits, batch["labels"]

    def encode(self, rows: Sequence[Any]) -> list[TokenPair]:
        """Tokenise rows of prompt and completion; notes what is cut and what has no completion."""
        check_text(rows, type(self).__name__)
        check_answers(rows)
        names = row_names(rows)
        sources = tokenize(
            self.tokenizer, [Passage(_prompt_of(row, name), ()) for row, name in zip(rows, names, strict=True)], self.max_length
        )
        answers = [answer_of(row) for row in rows]
        targets = self._tokenize_targets([Passage(text, ((0, len(text) + 1),)) for text in answers])
        longer = [max(pair, key=lambda tokens: tokens.length) for pair in zip(sources, targets, strict=True)]
        report_lengths(longer, [int(item.in_loss.sum()) for item in targets], self.max_length, names)
        return [TokenPair(source, target) for source, target in zip(sources, targets, strict=True)]

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

    def texts(self, item: TokenPair) -> list[Tokens]:
        """Return what the encoder reads and what the decoder writes."""
        return [item.source, item.target]

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

    def display(self, item: TokenPair) -> list[tuple[str, bool]]:
        """Return each token's characters, of the prompt and then of the completion, and whether it is in the loss."""
        return item.source.display() + item.target.display()

    def predicted_tokens(self, item: TokenPair) -> list[str]:
        """Return the characters of the token that each of the decoder's `T` positions predicts."""
        return item.target.pieces[: _written(item)]

    def _encode_query(self, row: Mapping[str, Any], name: str) -> TokenPair:
        answer = answer_of(row)
        stretch = span_in_answer(row) if "span" in row else (0, len(answer) + 1)
        (source,) = tokenize(self.tokenizer, [Passage(_prompt_of(row, f"query {name}"), ())], self.max_length)
        (target,) = self._tokenize_targets([Passage(answer, (stretch,))])
        needed = max(source.length, target.needed)
        self._refuse_cut(needed, f"Query {name} is cut off.", f"the query needs {needed:,} tokens")
        return TokenPair(source, target)

    def _tokenize_targets(self, passages: Sequence[Passage]) -> list[Tokens]:
        return tokenize(self.tokenizer, passages, self.max_length, append_eos=self.append_eos, target=True)


def _written(item: TokenPair) -> int:
    """Count the tokens up to the last one in the loss."""
    return up_to_last(item.target.in_loss)


def _prompt_of(row: Mapping[str, Any], name: str) -> str:
    if "prompt" not in row:
        raise UsageError(
            "An encoder-decoder model needs rows of prompt and completion.",
            given=f"{name}, with {', '.join(row)}",
            fix='name the columns: columns={"prompt": "...", "completion": "..."}',
        )
    return row["prompt"]
