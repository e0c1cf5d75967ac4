"""Language models that predict the next token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from whence.errors import ChatTemplateError, UsageError
from whence.progress import note
from whence.settings import valid
from whence.tasks.base import Batch
from whence.tasks.chat import ASKS_DATE, DATE, FLAG, chat_template_of, render, unwritten
from whence.tasks.forward import accepted, logits_of, unwrapped
from whence.tasks.head import chunked, worth_chunks
from whence.tasks.measurements import IGNORED, Measurement, draw_labels
from whence.tasks.questions import answer_of, span_in_answer
from whence.tasks.text import TextTask, check_answers, check_text
from whence.tasks.tokens import Passage, Tokens, pad, padding_id, report_lengths, row_names, tokenize, up_to_last


class CausalLM(TextTask):
    """Next-token prediction on texts, prompts with completions, or conversations.

    In the loss are all tokens of a text, those that hold any character of a completion, and the turns of the assistant.
    Losses are negative log-likelihoods in nats, summed over a row's tokens. `measurement` is what queries ask about:
    `"logprob"` of the completion, `"loss"` (its negative), `"margin"` (the log-odds of each token, summed), or a function
    of (model, batch).

    `chat_template` replaces the tokenizer's own (`"chatml"` for that format), `append_eos` ends texts and completions with
    the end-of-sequence token if the tokenizer doesn't. The side of the padding changes no result.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 512,
        *,
        measurement: Measurement = "logprob",
        chat_template: str | None = None,
        append_eos: bool = False,
        padding_side: Literal["right", "left"] = "right",
    ):
        super().__init__(tokenizer, max_length, measurement, append_eos)
        self.chat_template = chat_template_of(tokenizer, chat_template)
        self.padding_side = valid(Literal["right", "left"], padding_side, "padding_side")

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model, without a key-value cache: logits `[B, K, V]` and labels of the positions that `collate` kept.

        The head, often a fifth of a small model's products, is only applied there, where the model can be asked for that;
        not where its own inputs are looked at, which stand for all positions.
        """
        given, labels = _inputs(model, batch), _at(batch["labels"], batch)
        if "kept" in batch and "logits_to_keep" in accepted(model) and not _is_watched(model):
            given["logits_to_keep"] = batch["kept"]
        logits = logits_of(model, **given)
        if logits.shape[1] == batch["labels"].shape[1]:
            logits = _at(logits, batch)
        if logits.shape[:2] != labels.shape:
            raise UsageError(
                f"{type(model).__name__} gives logits for other positions than those of its input.",
                given=f"logits {tuple(logits.shape)} for {tuple(batch['input_ids'].shape)} tokens",
                accepted="logits [rows, tokens, vocabulary]",
            )
        return logits, labels

    def encode(self, rows: Sequence[Any]) -> list[Tokens]:
        """Tokenise rows; notes what is cut and what has nothing in the loss.

        Raises `EmptyLossError` when that is more than half, `ChatTemplateError` when a conversation can't be written,
        `UsageError` for rows without text or completion.
        """
        check_text(rows, type(self).__name__)
        tokens = self.tokenize(rows)
        report_lengths(tokens, [self.size(item) for item in tokens], self.max_length, row_names(rows))
        return tokens

    def tokenize(self, rows: Sequence[Any]) -> list[Tokens]:
        """Tokenise rows as `encode` does, whatever comes out: for looking at data."""
        check_answers(rows)
        passages = [self._passage(row, name) for row, name in zip(rows, row_names(rows), strict=True)]
        self._say_what_is_left_out(rows, passages)
        return self._tokenize(passages)

    def collate(self, items: Sequence[Tokens]) -> Batch:
        """Batch items: `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`.

        Labels are shifted already: `labels[b, t]` is the token that position `t` predicts, or -100. Nothing is computed
        past the last label. `kept`, where it is given, are the only positions where any row has a label. Left padding adds
        `position_ids`.
        """
        sizes = [self.size(item) for item in items]
        inputs = [item.ids[:size] for item, size in zip(items, sizes, strict=True)]
        labels = [np.where(item.in_loss, item.ids, IGNORED)[1 : size + 1] for item, size in zip(items, sizes, strict=True)]
        side, fill = self.padding_side, padding_id(self.tokenizer)
        batch: dict[str, Any] = {
            "input_ids": pad(inputs, fill, side),
            "attention_mask": pad([np.ones_like(row) for row in inputs], 0, side),
            "labels": pad(labels, IGNORED, side),
        }
        anywhere = (batch["labels"] != IGNORED).any(0)
        if not bool(anywhere.all()):
            batch["kept"] = anywhere.nonzero().squeeze(1)
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    def size(self, item: Tokens) -> int:
        """Count the positions up to the last one that predicts a token in the loss."""
        return up_to_last(item.in_loss[1:])

    def predictions(self, item: Tokens) -> int:
        """Count the tokens in the loss."""
        return int(item.in_loss.sum())

    def noise_shape(self, item: Tokens) -> tuple[int, ...]:
        """Return `(T,)`: one number for each position."""
        return (self.size(item),)

    def settings(self, **own: Any) -> dict[str, Any]:
        """Name what decides about tokens, losses and measurements (the padding doesn't)."""
        template = self.chat_template and hashlib.blake2b(self.chat_template.encode(), digest_size=8).hexdigest()
        return super().settings(chat_template=template, **own)

    def display(self, item: Tokens) -> list[tuple[str, bool]]:
        """Return each token's characters and whether it is in the loss; joined they are the text (up to the cut)."""
        return item.display()

    def predicted_tokens(self, item: Tokens) -> list[str]:
        """Return the characters of the token that each of the item's `T` positions predicts.

        Special tokens that spell nothing have their name; the empty rest of a character belongs to the piece before.
        """
        specials = set(self.tokenizer.all_special_ids)
        named = zip(item.ids[1 : self.size(item) + 1].tolist(), item.pieces[1:], strict=False)
        return [
            self.tokenizer.convert_ids_to_tokens(token) if not piece and token in specials else piece for token, piece in named
        ]

    def _passage(self, row: Mapping[str, Any], name: str) -> Passage:
        if "messages" in row:
            try:
                return render(self.tokenizer, self.chat_template, row["messages"], row.get("tools"))
            except ChatTemplateError as error:
                given = f"{name}: {error.given}"
                raise ChatTemplateError(error.what, given=given, accepted=error.accepted, fix=error.fix) from error
        answer, prompt = answer_of(row), row.get("prompt", "")
        return Passage(prompt + answer, ((len(prompt), len(prompt) + len(answer) + 1),))

    def _say_what_is_left_out(self, rows: Sequence[Any], passages: Sequence[Passage]) -> None:
        """Note what of conversations the chat template doesn't write, and what it is told instead of today's date."""
        talks = any("messages" in row for row in rows)
        if talks and ASKS_DATE in (self.chat_template or ""):
            note(f"the chat template writes today's date; it is told {DATE:%d %B %Y} every day, so that rows stay the same")
        if talks and self.append_eos:
            note("append_eos changes no conversation: the chat template says how turns end")
        missing: dict[str, str] = {}
        for name, row, passage in zip(row_names(rows), rows, passages, strict=True):
            if "tools" in row or any(turn.keys() - {"role", "content", FLAG} for turn in row.get("messages", ())):
                left_out = unwritten(self.tokenizer, self.chat_template, row["messages"], row.get("tools"), passage.text)
                missing = {**dict.fromkeys(left_out, name), **missing}
        for part, name in missing.items():
            note(f"warning: the chat template does not write {part}, so the model never sees it (first in {name})")

    def _encode_query(self, row: Mapping[str, Any], name: str) -> Tokens:
        if "messages" in row:  # what is asked about is in the loss, whatever training left out
            turns = [{key: value for key, value in turn.items() if key != FLAG} for turn in row["messages"]]
            row = {**row, "messages": turns}
        answer, passage = answer_of(row), self._passage(row, f"query {name}")
        first, last = passage.answers[-1]
        if "span" in row:
            begin = passage.text.index(answer.strip(), first) - answer.index(answer.strip())  # templates may strip
            first, last = (begin + position for position in span_in_answer(row))
        (tokens,) = self._tokenize([replace(passage, answers=((first, last),))])
        needed = tokens.needed
        self._refuse_cut(needed, f"The answer of query {name} is cut off.", f"the answer ends at token {needed:,}")
        if self.size(tokens) == 0:
            raise UsageError(f"Query {name} has no answer that the model predicts.", given=repr(passage.text[:200]))
        return tokens

    def _tokenize(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Tokenise; the first token is never in the loss, since nothing predicts it."""
        tokens = tokenize(self.tokenizer, passages, self.max_length, append_eos=self.append_eos)
        for item in tokens:
            item.in_loss[:1] = False
        return tokens

    def _measured(
        self, model: nn.Module, batch: Batch, measure: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None = None
    ) -> Tensor:
        labels, noise = _at(batch["labels"], batch), None if noise is None else _at(noise, batch)
        if _is_watched(model) or not worth_chunks(model, labels.numel()):
            return super()._measured(model, batch, measure, noise)

        def of(logits: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
            return measure(logits, labels if noise is None else draw_labels(logits, labels, noise))

        return chunked(model, _inputs(model, batch), batch.get("kept"), of, labels, noise)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model is called with."""
    names = accepted(model)
    lost = ({"attention_mask", "position_ids"} & accepted(unwrapped(model))) - names if "position_ids" in batch else ()
    if lost:
        raise UsageError(
            f"{type(model).__name__} does not hand on {' and '.join(sorted(lost))}, without which rows padded on the left are "
            "read as others.",
            given=f"forward takes {', '.join(sorted(names - {'self'}))}",
            accepted="padding on the right, or a forward that takes and hands on both",
            fix='CausalLM(tokenizer, padding_side="right")',
        )
    given = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch and name in names}
    return {"input_ids": batch["input_ids"], **given, **({"use_cache": False} if "use_cache" in names else {})}


def _is_watched(model: nn.Module) -> bool:
    """Whether hooks sit on the model's head."""
    head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    return head is not None and any(module._forward_hooks for module in head.modules())


def _at(per_position: Tensor, batch: Batch) -> Tensor:
    """What is said of each position `[B, T, ...]`, for the positions that were kept."""
    return per_position[:, batch["kept"]] if "kept" in batch else per_position
