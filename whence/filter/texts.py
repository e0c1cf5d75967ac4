"""Scores that come from the words of queries and rows alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from whence.data.rows import Rows
from whence.engine.stream import identify
from whence.store.scores import Scores, describe_rows, row_text

_WORD = re.compile(r"\b\w\w+\b")


def words_of(text: str) -> list[str]:
    """The text's words: runs of two or more letters or digits, in lower case."""
    return _WORD.findall(text.lower())


def scores_of_texts(
    method: str, unit: str, queries: Sequence[Any], rows: Sequence[Any], of: Callable[[list[str], list[str]], np.ndarray]
) -> Scores:
    """What `of` makes of the texts of queries and rows, `[Q, N]`, as scores; a row's share is not divided by their number."""
    asked, texts = ([row_text(row) for row in side] for side in (queries, rows))
    import pandas

    copies = rows.copies if isinstance(rows, Rows) else None
    names = queries.ids if isinstance(queries, Rows) else [f"query-{number}" for number in range(len(queries))]
    return Scores(
        raw=of(asked, texts),
        n_train=1,
        examples=describe_rows(rows, identify(rows)[0], [0] * len(rows), copies),
        queries=pandas.DataFrame({"id": list(names), "text": asked}),
        about={"unit": unit, "operator": method},
    )
