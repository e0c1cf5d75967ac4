"""Rows, questions and task, as given by the settings of a run or of a command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence.config.read import Checked
from whence.config.schema import Scoring, Stages, Trained
from whence.data import Rows, load_data
from whence.data.load import count_rows
from whence.data.rows import with_contents
from whence.data.text import is_written, written
from whence.engine.point import Point
from whence.fitting import open_factors
from whence.methods.base import Recipe, recipe_named
from whence.models import load_model
from whence.progress import note
from whence.settings import Data, Through, Weights
from whence.stages import Stage
from whence.tasks import task_for
from whence.train.reading import as_trained, record_of, shown
from whence.train.record import read_training
from whence.train.replay import History
from whence.train.state import STATE, read_state


def rows_of(data: Data, path: str | None = None) -> Rows:
    """The rows as the model reads them; `path` is where they are, if elsewhere than the settings say."""
    rows = load_data(path or data.path, columns=data.columns, split=data.split, limit=data.limit)
    if data.format != "plain" and all(is_written(row, data.format) for row in rows):
        note(f"{rows.origin}: the rows are already written as {shown(data.format)}, and are left unchanged")
        return written(rows, "plain", data.normalise)
    if data.format == "plain":
        _note_bare_joints(rows)
    return written(rows, data.format, data.normalise)


def _note_bare_joints(rows: Rows) -> None:
    """Note where prompts and completions meet without a space: a column of each is often meant to have one between them."""
    pairs = [(row["prompt"], row["completion"]) for row in rows if "prompt" in row and "completion" in row]
    bare = [(left, right) for left, right in pairs if re.search(r"[!-~]$", left) and re.match("[0-9A-Za-z]", right)]
    if bare and len(bare) >= 0.9 * len(pairs):
        left, right = bare[0]
        note(
            f"prompt and completion meet without a space in {len(bare):,} of {len(pairs):,} rows, such as "
            f"{left[-12:] + right[:12]!r}: data.format (--format) says what comes between them, if that is not meant"
        )


def as_prompts(asked: Rows) -> Rows:
    """Rows of nothing but a text, such as a list of strings, as prompts: a text of prompts is there to be completed."""
    bare = [{("prompt" if name == "text" else name): value for name, value in row.items()} for row in asked]
    return with_contents(asked, bare) if all("prompt" not in row and "text" in row for row in asked) else asked


def in_turns(asked: Rows, rows: Rows, *, mere: bool = False) -> Rows:
    """Prompts as a user's turns where the rows are conversations; with `mere`, only those without a completion."""
    if "messages" not in rows[0] or not any("prompt" in row and not (mere and "completion" in row) for row in asked):
        return asked
    note("prompts are asked as a user's turn, since the rows are conversations")
    return with_contents(asked, [row if mere and "completion" in row else _as_turns(row) for row in asked])


def question_like(
    row: Any, question: str, parts: dict[str, str | None], task: Any, data: Data, model: str | None
) -> dict[str, Any]:
    """The question as the model is used to being asked: a user's turn where the rows or the tokenizer speak of conversations.

    `parts` are its completion, contrast and span, as far as there are any. A model that whence trained on other rows, and rows
    with a format of their own, say that it is asked as those are written.
    """
    rest = {name: value for name, value in parts.items() if value is not None}
    chat = "messages" in row
    if not chat and getattr(task, "chat_template", None) is not None and data.format == "plain":
        chat = model is None or record_of(model) is None
        if chat:
            note("the question is a user's turn, written by the model's chat template; --template none asks it as bare text")
    asked = {"prompt": question, **rest}
    return _as_turns(asked) if chat else asked


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
        note(f"N = {len(rows):,}, the rows read: {data.path} does not say how many it has; give it with whence score --n-train")
    elif count != len(rows):
        note(f"N = {count:,}, {why}: values are per copy in a training on N rows; for another N: whence score --n-train")
    return count


def stage_of(name: str, through: Through, point: Point, curvature: Any, model: str, n_train: int | None) -> Stage:
    """A training that is over, as the settings say; what it was is looked for above its model where they don't."""
    given = through.part(Through).as_json()
    training = given.pop("training")
    if training is None and through.rates is None and (found := record_of(model)):
        training = found[0].parent
    history = None if training is None else _history(Path(training), point)
    return Stage(name, point, curvature, history, n_train=n_train, **given)


def _history(path: Path, point: Point) -> History:
    """A training of `whence train`, or what a checkpoint of the Trainer tells of one."""
    trainer = path.name == STATE or (path / STATE).is_file()
    return read_state(path, point) if trainer else read_training(path)


def located(name: str, checked: Checked[Stages], made: Mapping[str, Any] | None = None) -> tuple[Trained, Data]:
    """What a file of stages says of one, with whole paths, and its data with what isn't said as in its training."""
    settings, place = checked.config.stages[name], checked.place
    keys = ("model", "adapter", "tokenizer", "training", "factors")
    settings = settings.changed(**{key: place(value) for key in keys if (value := getattr(settings, key))})
    data, start = settings.data.changed(path=place(settings.data.path)), f"stages.{name}.data."
    said = {key.removeprefix(start) for key in checked.origins if key.startswith(start)}
    return settings, as_trained(data, said, settings.adapter, settings.model, made=made)


def read_stage(name: str, checked: Checked[Stages], measurement: Any, batch_tokens: int | None) -> tuple[Stage, Data]:
    """A training of a file of stages, and how its rows are read."""
    factors = checked.config.stages[name].factors
    curvature = open_factors(checked.place(factors)) if factors else None
    settings, data = located(name, checked, curvature.provenance if curvature else None)
    model, tokenizer = load_model(settings.model, **settings.part(Weights).as_json())
    task, rows = task_of(model, tokenizer, data, measurement), rows_of(data)
    if curvature is not None:
        curvature.check(model, task)
    own = settings.adapter or settings.model
    point = Point(model, task, rows, batch_tokens=batch_tokens)
    return stage_of(name, settings, point, curvature or settings.fit, own, trained_on(own, data, rows)), data


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
