"""Text as token ids that know which characters they hold and whether they are in the loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.errors import EmptyLossError, UsageError
from whence.progress import note

CHUNK = 100
"""Texts that are tokenised at once: their offsets take ten times the memory of the arrays that are kept."""

BEGINNING = 64
"""Tokens of a row that are kept to compare tokenizers by."""


@dataclass(frozen=True)
class Passage:
    """A text and the stretches of it, `(first, one past last)` character, whose tokens are in the loss.

    A stretch that ends one past the text takes in the end-of-sequence token too.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    special: bool = True
    """Whether the tokenizer adds its own special tokens (a chat template has written them already)."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as the model reads it, cut off at the maximum length; `L` tokens."""

    ids: np.ndarray
    """Token ids, int64 `[L]`."""
    in_loss: np.ndarray
    """Which tokens are in the loss, bool `[L]`."""
    ends: np.ndarray
    """How many characters of the text are spelt when the token is complete, int32 `[L]`, never falling."""
    text: str
    length: int
    """Tokens before the cut."""
    needed: int
    """Tokens up to the last one in the loss, before the cut."""

    @property
    def pieces(self) -> list[str]:
        """The characters of each token; joined they are the text (up to the cut).

        A character whose bytes are shared by several tokens belongs to the first, and the others are empty, as are special
        tokens that the tokenizer added.
        """
        return [self.text[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]

    def display(self) -> list[tuple[str, bool]]:
        """Each token's characters, and whether it is in the loss."""
        return list(zip(self.pieces, self.in_loss.tolist(), strict=True))


def beginning(item: Any) -> dict[str, Any] | None:
    """How a row begins, as text and as ids, to see later whether another tokenizer reads it so; None where it is no text."""
    if not isinstance(item, Tokens):
        return None
    count = min(len(item.ids), BEGINNING)
    return {"text": item.text[: int(item.ends[count - 1])], "ids": item.ids[:count].tolist()}


def first_difference(tokenizer: Any, begins: dict[str, Any]) -> str:
    """The first token that the tokenizer reads otherwise than `beginning` kept it, in words."""
    (now,) = tokenize(tokenizer, [Passage(begins["text"], ())], BEGINNING)
    for number, (before, after) in enumerate(itertools.zip_longest(begins["ids"], now.ids.tolist())):
        if before != after:
            piece = now.pieces[number] if number < len(now.pieces) else ""
            return f"first differing token of the first row: number {number}, id {before} -> {after} {piece!r}"
    return f"the first {len(begins['ids'])} tokens of the first row are the same"


def tokenize(
    tokenizer: Any, passages: Sequence[Passage], max_length: int, *, append_eos: bool = False, target: bool = False
) -> list[Tokens]:
    """Tokenise each passage as a whole, so that a token is in the loss when it holds any character of an answer.

    `append_eos` ends a passage with the end-of-sequence token unless the tokenizer has; `target` reads the text as an
    encoder-decoder's output. Raises `UsageError` for a tokenizer that can't tell which characters a token holds.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            "This tokenizer can't tell which characters a token holds, so the answer can't be found in a row.",
            given=type(tokenizer).__name__,
            accepted="a fast tokenizer (transformers: AutoTokenizer.from_pretrained(..., use_fast=True))",
        )
    tokens: list[Tokens] = []
    for special, group in itertools.groupby(passages, key=lambda passage: passage.special):
        eos = tokenizer.eos_token_id if append_eos and special else None
        while chunk := list(itertools.islice(group, CHUNK)):
            encoded = tokenizer(
                **{"text_target" if target else "text": [passage.text for passage in chunk]},
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
            columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
            for passage, ids, offsets, added in zip(chunk, *columns, strict=True):
                kept = without_doubles(tokenizer, ids, added)
                if len(kept) < len(ids):
                    ids, offsets, added = ([column[i] for i in kept] for column in (ids, offsets, added))
                tokens.append(_align(passage, ids, offsets, added, eos, max_length))
    return tokens


def without_doubles(tokenizer: Any, ids: Sequence[int], added: Sequence[int]) -> Sequence[int]:
    """The places of the tokens without special ones that the tokenizer adds to a text which spells them already.

    `added` says which tokens the tokenizer adds. A text that begins with "<s>" has one <s>, and one that ends with "</s>" one
    </s>, as the model was trained; it is noted.
    """
    first = next((i for i, special in enumerate(added) if not special), len(ids))
    last = next((i for i in range(len(ids) - 1, -1, -1) if not added[i]), -1)
    doubles = {
        extra
        for extra, real in ((first - 1, first), (last + 1, last))
        if 0 <= extra < len(ids) > first and ids[extra] == ids[real]
    }
    for token in sorted({ids[i] for i in doubles}):
        name = tokenizer.convert_ids_to_tokens(token)
        note(f"texts that spell {name} themselves get no second {name} from the tokenizer")
    return [i for i in range(len(ids)) if i not in doubles] if doubles else range(len(ids))


def _align(
    passage: Passage, ids: list[int], offsets: list[tuple[int, int]], added: list[int], eos: int | None, max_length: int
) -> Tokens:
    """Give every character to a token, and cut off what is too long.

    Offsets are not exact: byte-level tokenizers may leave white space out of them, and normalisers may drop characters.
    Such characters go to the next token, and what is left at the end to the last.
    """
    total, special = len(passage.text), np.array(added, bool)
    first, last = np.fromiter(itertools.chain.from_iterable(offsets), np.int32, 2 * len(ids)).reshape(-1, 2).T
    # an empty offset is white space that was left out, at least one character: end[i] = max(end[i - 1] + empty[i], last[i])
    empty = np.cumsum(~special & (first == last), dtype=np.int32)
    ends = np.minimum(empty + np.maximum.accumulate(np.maximum(np.where(special, 0, last) - empty, 0)), total)
    ends[len(ids) if special.all() else up_to_last(~special) - 1 :] = total
    before = np.concatenate([[0], ends[:-1]])
    begins = np.where(special, before, np.minimum(first, before))
    if eos is not None and (not ids or ids[-1] != eos):
        ids, begins, ends = [*ids, eos], np.append(begins, total), np.append(ends, np.int32(total))
    in_loss = np.zeros(len(ids), bool)
    for begin, end in passage.answers:
        in_loss |= (ends > begin) & (begins < end)
    return Tokens(
        ids=np.array(ids[:max_length], np.int64),
        in_loss=in_loss[:max_length].copy(),
        ends=ends[:max_length].copy(),
        text=passage.text,
        length=len(ids),
        needed=up_to_last(in_loss),
    )


def up_to_last(mask: np.ndarray) -> int:
    """Count the positions up to the last True."""
    (places,) = mask.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def pad(rows: Sequence[np.ndarray], fill: int | float | bool, side: str = "right") -> Tensor:
    """Put rows of different length into one tensor `[B, T]`."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, slice(len(row)) if side == "right" else slice(width - len(row), width)] = row
    return torch.from_numpy(padded)


def padding_id(tokenizer: Any) -> int:
    """Choose an id for padded positions; which one changes nothing."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def report_lengths(tokens: Sequence[Tokens], in_loss: Sequence[int], max_length: int, names: Sequence[str]) -> None:
    """Note how many rows were cut and how many have no token in the loss.

    `in_loss` counts each row's tokens in the loss. Raises `EmptyLossError` when more than half of the rows have none.
    """
    rows = len(tokens)
    cut = sum(row.length > max_length for row in tokens)
    if cut:
        longest = max(row.length for row in tokens)
        share = f"{cut:,} of {rows:,} rows ({cut / rows:.1%})"
        note(f"{share} are cut at max_length={max_length}; the longest has {longest:,} tokens")
    empty = [name for name, count in zip(names, in_loss, strict=True) if count == 0]
    if not empty:
        return
    listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    if 2 * len(empty) > rows:
        lost = sum(row.needed > max_length for row in tokens)
        raise EmptyLossError(
            f"{len(empty):,} of {rows:,} rows have no token in the loss.",
            given=f"max_length={max_length}; {lost:,} rows lose part of their answer to it; rows without loss: {listed}",
            accepted="at most half of the rows without an answer to predict",
            fix="a longer max_length (--max-length), or another completion column; see the rows: whence data preview",
        )
    note(f"{len(empty):,} of {rows:,} rows have no token in the loss and are left out: {listed}")


def numbered_names(names: Sequence[str], numbers: Sequence[int]) -> str:
    """Say which rows: the first five by their numbers, counted from 1, with their ids."""
    listed = [f"{number + 1}" + ("" if names[number].startswith("row ") else f" ({names[number]})") for number in numbers[:5]]
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(listed)}{', ...' if len(numbers) > 5 else ''}"


def row_names(rows: Sequence[Any]) -> Sequence[str]:
    """Return the ids of the rows if they have any, else their positions."""
    return getattr(rows, "ids", None) or [f"row {i}" for i in range(len(rows))]
