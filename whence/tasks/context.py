"""How many tokens a model was made to read at a time, and which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from whence.errors import UsageError
from whence.layers import modules_of
from whence.progress import note
from whence.tasks.forward import unwrapped
from whence.tasks.tokens import padding_id

POSITIONS = re.compile(r"(^|_)(wpe|pos|pos_?emb\w*|position\w*)(_|$)")
"""Names of tables that hold a vector for each position."""


def context_of(model: Any) -> tuple[int | None, bool]:
    """The tokens that the model was made for (None where it doesn't say), and whether it has no positions past them."""
    tables = [
        table.num_embeddings - _skipped(table)
        for module in modules_of(unwrapped(model))
        for name, table in module._modules.items()
        if isinstance(table, nn.Embedding) and POSITIONS.search(name) and "rel" not in name
    ]
    if tables:
        return min(tables), True
    return length_in(getattr(unwrapped(model), "config", None)), False


def length_in(config: Any) -> int | None:
    """The tokens that a model of this config is made for, if it says so."""
    text = getattr(config, "get_text_config", lambda: config)()
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _skipped(table: nn.Embedding) -> int:
    """Entries of a table of positions that stand for none: OPT and BART begin at 2, RoBERTa after its padding."""
    offset = getattr(table, "offset", None)
    return offset if isinstance(offset, int) else 0 if table.padding_idx is None else table.padding_idx + 1


def check_context(model: Any, lengths: Sequence[int], names: Sequence[str]) -> None:
    """Refuse rows for which the model has no positions; note those longer than it was made for."""
    limit, firm = context_of(model)
    longer = [number for number, length in enumerate(lengths) if limit is not None and length > limit]
    if not longer or limit is None:
        return
    longest = max(longer, key=lambda number: lengths[number])
    what = f"{len(longer):,} of {len(lengths):,} rows are longer than the {limit:,} tokens that the model was made for"
    worst = f"{names[longest]} has {lengths[longest]:,}"
    if not firm:
        note(f"warning: {what}: {worst}; --max-length {limit} cuts them there")
        return
    raise UsageError(
        f"{what}, and it has no positions past them.",
        given=f"the longest, {worst}",
        accepted=f"rows of at most {limit:,} tokens",
        fix=f"--max-length {limit}    (Python: max_length={limit})",
    )


def check_tokens(model: Any, tokenizer: Any, texts: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> None:
    """Refuse rows with a token that the model has no embedding for; `texts` are the tokens' ids of each row's texts."""
    inner = unwrapped(model)
    if not hasattr(inner, "get_input_embeddings"):
        return
    known = len(inner.get_input_embeddings().weight)
    for row, name in zip(texts, names, strict=True):
        token = max((int(ids.max()) for ids in row if len(ids)), default=0)
        if token >= known:
            raise _no_embedding(f"{name} has", tokenizer, token, known)
    if padding_id(tokenizer) >= known:
        raise _no_embedding("The tokenizer pads with", tokenizer, padding_id(tokenizer), known)


def _no_embedding(what: str, tokenizer: Any, token: int, known: int) -> UsageError:
    return UsageError(
        f"{what} the token {tokenizer.convert_ids_to_tokens(token)!r}, which the model has no embedding for",
        given=f"token {token:,}, where the model knows {known:,}",
        accepted="the tokenizer that the model was trained with",
        fix="load the model that was trained after model.resize_token_embeddings(len(tokenizer)), or its own tokenizer "
        "(--tokenizer); padding can be any token: tokenizer.pad_token = tokenizer.eos_token",
    )
