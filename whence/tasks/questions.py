"""What a query row asks about: its completion, a span of it, or the difference between two completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whence.errors import UsageError

Row = Mapping[str, Any]


def answer_of(row: Row) -> str:
    """Take the text that a query asks about; raises `UsageError` (22) when the row has only a prompt."""
    if "text" in row:
        return row["text"]
    if "completion" in row:
        return row["completion"]
    if row.get("messages") and row["messages"][-1]["role"] == "assistant":
        return row["messages"][-1]["content"]
    shown = row["prompt"] if "prompt" in row else row["messages"][-1]["content"] if row["messages"] else ""
    raise UsageError(
        "This query has a prompt but no completion, so there is nothing to explain yet.",
        given=repr(shown[:200]),
        accepted='{"prompt": "...", "completion": "..."}, or messages that end with the assistant',
        fix="write down what the model said as the completion, or let it speak: whence generate",
        code=22,
    )


def has_answer(row: Row) -> bool:
    """Whether the row says what is asked about, and is no mere prompt."""
    return "text" in row or "completion" in row or bool(row.get("messages") and row["messages"][-1]["role"] == "assistant")


def with_answer(row: Row, answer: str) -> Row:
    """Give the row another completion, or its first."""
    if "messages" in row:
        before = row["messages"][:-1] if has_answer(row) else row["messages"]
        return {**row, "messages": [*before, {"role": "assistant", "content": answer}]}
    return {**row, "text" if "text" in row else "completion": answer}


def variants(row: Row) -> list[tuple[Row, float]]:
    """List the rows whose weighted measurements answer the query: itself, and minus the contrast if there is one."""
    answer_of(row)
    alone = {key: value for key, value in row.items() if key != "contrast"}
    if "contrast" not in row:
        return [(alone, 1.0)]
    if "span" in row:
        raise UsageError(
            "A query asks about a span of its completion or about a contrast to another one, not both.",
            given=f"span {row['span']!r} and contrast {row['contrast']!r}",
        )
    return [(alone, 1.0), (with_answer(alone, row["contrast"]), -1.0)]


def span_in_answer(row: Row) -> tuple[int, int]:
    """Find the row's span in its answer: its first character, and one past its last.

    The span is a text, of which the first occurrence counts, or these two numbers; one past the answer is what ends it.
    """
    answer, span = answer_of(row), row["span"]
    if not isinstance(span, str):
        first, last = span
        if not 0 <= first < last <= len(answer) + 1:
            raise UsageError(
                "The span that this query asks about is not in its completion.",
                given=f"characters {first} to {last}, of {len(answer)}",
                accepted="the first character, counted from 0, and one past the last",
            )
        return first, last
    first = answer.find(span)
    if first < 0 or not span:
        raise UsageError(
            "The span that this query asks about is not in its completion.",
            given=f"span {span!r}, completion {answer[:200]!r}",
            accepted="a part of the completion, verbatim",
        )
    return first, first + len(span)
