"""Rows and task, as the settings of a run or of a command say."""

from __future__ import annotations

from typing import Any

from whence.data import Rows, load_data
from whence.data.text import is_written, written
from whence.progress import note
from whence.settings import Data
from whence.tasks import task_for
from whence.train.reading import shown


def rows_of(data: Data, path: str | None = None) -> Rows:
    """The rows as the model reads them; `path` is where they are, if elsewhere than the settings say."""
    rows = load_data(path or data.path, columns=data.columns, split=data.split, limit=data.limit)
    if data.format != "plain" and all(is_written(row, data.format) for row in rows):
        note(f"{rows.origin}: the rows are written as {shown(data.format)} already, and stay as they are")
        return written(rows, "plain", data.normalise)
    return written(rows, data.format, data.normalise)


def task_of(model: Any, tokenizer: Any, data: Data, measurement: Any = "logprob") -> Any:
    """How text becomes tokens and what is asked."""
    return task_for(
        model, tokenizer, data.max_length, measurement=measurement, chat_template=data.chat_template, append_eos=data.append_eos
    )
