"""Rows and task, as the settings of a run or of a command say."""

from __future__ import annotations

from typing import Any

from whence.config.schema import Scoring
from whence.data import Rows, load_data
from whence.data.load import count_rows
from whence.data.rows import with_contents
from whence.data.text import is_written, written
from whence.methods.base import Recipe, recipe_named
from whence.progress import note
from whence.settings import Data
from whence.tasks import task_for
from whence.train.reading import record_of, shown


def rows_of(data: Data, path: str | None = None) -> Rows:
    """The rows as the model reads them; `path` is where they are, if elsewhere than the settings say."""
    rows = load_data(path or data.path, columns=data.columns, split=data.split, limit=data.limit)
    if data.format != "plain" and all(is_written(row, data.format) for row in rows):
        note(f"{rows.origin}: the rows are written as {shown(data.format)} already, and stay as they are")
        return written(rows, "plain", data.normalise)
    return written(rows, data.format, data.normalise)


def in_turns(asked: Rows, rows: Rows, *, mere: bool = False) -> Rows:
    """Prompts as a user's turns where the rows are conversations; of `mere` prompts only those without a completion."""
    if "messages" not in rows[0] or not any("prompt" in row and not (mere and "completion" in row) for row in asked):
        return asked
    note("prompts are asked as a user's turn, since the rows are conversations")
    return with_contents(asked, [row if mere and "completion" in row else _as_turns(row) for row in asked])


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt, with its completion if it has one, as a conversation."""
    if "prompt" not in row:
        return row
    said = [{"role": "assistant", "content": row["completion"]}] if "completion" in row else []
    rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    return {"messages": [{"role": "user", "content": row["prompt"]}, *said], **rest}


def trained_on(model: str, data: Data, rows: Rows) -> int | None:
    """N, the rows that the model was trained on, where these are not known to be all of them; None where they are.

    The record of the training beside the model says it. Without one it is all that the data has, of which `limit` reads some.
    """
    file, record = record_of(model) or (None, {})
    if "train" in record.get("rows", {}):
        count = int(record["rows"]["train"])
        why = f"the rows that the model was trained on ({file})"
    elif data.limit is not None and len(rows) == data.limit:
        count = count_rows(data.path, columns=data.columns, split=data.split)
        why = f"the rows of {data.path}, of which the first {len(rows):,} are scored"
    else:
        return None
    if count is None:
        note(f"N = {len(rows):,}, the rows read: {data.path} does not say how many it has; say it with whence score --n-train")
    elif count != len(rows):
        note(f"N = {count:,}, {why}: values are per copy in a training on N rows; for another N: whence score --n-train")
    return count


def method_of(settings: Scoring) -> tuple[Recipe, Any]:
    """The recipe that scores the rows of a run, with its settings; it damps as the run does unless its own options say how.

    Raises UsageError where there is no such method, or it doesn't have such a setting.
    """
    recipe = recipe_named(str(settings.method))
    said = {} if settings.damping == Scoring().damping else {"damping": settings.damping}
    return recipe, recipe.own(said | settings.options, typed=True)


def task_of(model: Any, tokenizer: Any, data: Data, measurement: Any = "logprob") -> Any:
    """How text becomes tokens and what is asked."""
    return task_for(
        model, tokenizer, data.max_length, measurement=measurement, chat_template=data.chat_template, append_eos=data.append_eos
    )
