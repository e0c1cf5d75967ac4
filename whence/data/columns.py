"""From the columns of somebody's file to the fields that whence reads.

A mapping says which column plays which part: `{"prompt": "Input", "completion": "Output"}`. Columns joined by `+` are
put together, one per line, and empty ones are left out: `{"prompt": "instruction+input", "completion": "output"}`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whence.data.turns import FLAGS, is_turns, joined, read_turns, with_context
from whence.errors import ColumnError, UsageError
from whence.escapes import command
from whence.progress import note

ROLES = ("text", "prompt", "completion", "messages", "source", "id", "label", "contrast", "span")
"""The parts that a column can play."""

SHAPES = ({"text"}, {"prompt"}, {"prompt", "completion"}, {"messages"})
"""What a row is made of; the other roles only come along."""

PAIRS = (
    *(("instruction+input", "output"), ("instruction+context", "response"), ("instruction", "output")),
    *(("instruction", "response"), ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer")),
    *(("question", "answer"), ("question", "response"), ("input", "output"), ("input", "target")),
)
"""Columns of prompts with those of their completions."""

GUESSES = (
    *({"messages": name} for name in ("messages", "conversations", "conversation")),
    *({"prompt": prompt, "completion": completion} for prompt, completion in PAIRS),
    *({"text": name} for name in ("text", "content", "story", "document")),
    *({"prompt": name} for name in ("prompt", "question")),
)
"""Well-known columns, the more telling first; names are compared without regard to case."""

COMPANIONS = {"source": str | int, "label": str | int | float, "contrast": str, "span": str}
"""Roles that a column of the same name plays without being asked, if its values have this type."""

NAMES = ("id", "_id", "idx", "index", "uid", "uuid", "unnamed: 0")
"""Columns that only number rows."""

LISTED = 8
"""Columns that are named at most."""

Record = Mapping[str, Any]


def read_columns(
    records: Sequence[Record],
    columns: Mapping[str, str] | None,
    origin: str,
    place: Callable[[int], str] | None = None,
) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Turn records into rows, and the user's ids if `columns` names a column for them.

    Without a mapping of the content, well-known column names are looked for in each record, and what was found is noted, as
    are columns that nothing reads. `place` says where the record of a number is, for messages; counted from 1.
    Raises `ColumnError` when a column is missing or nothing looks like text, `UsageError` for values that aren't text.
    """
    given = dict(columns or {})
    _check_roles(given)
    _check_names(given, records, origin)
    guessed: dict[tuple[str, ...], dict[str, str]] = {}
    rows, ids = [], []
    unread: dict[str, None] = {}
    unread_of_turns: dict[str, None] = {}
    for number, record in enumerate(records, start=1):
        where, mapping = place(number) if place else f"Row {number} of {origin}", given
        if not given.keys() & {"text", "prompt", "messages"}:
            names = tuple(name for name, value in record.items() if value is not None)
            if names not in guessed:
                guessed[names] = _guess(names, record, origin)
            mapping = {**guessed[names], **given}
        row = {role: _value(record, role, column, where, unread_of_turns) for role, column in mapping.items()}
        if "id" in mapping:
            ids.append(row.pop("id"))
        row = {role: value for role, value in row.items() if value is not None}
        if not isinstance(row.get("prompt", ""), str) or not isinstance(row.get("completion", ""), str):
            row = joined(row)
        used = [name for column in mapping.values() for name in _split(column, record)]
        if "messages" in row:
            row, context = with_context(row, record, where)
            used += context
        unread |= dict.fromkeys(name for name, value in record.items() if name not in unread and _says(name, value, used))
        _check_characters(row, where)
        rows.append(row)
    for mapping in {json.dumps(m): m for m in guessed.values()}.values():
        if any(role != column for role, column in mapping.items()):
            said = ", ".join(f"{role} = {column}" for role, column in mapping.items())
            note(f"{origin}: read as {said} (guessed from the column names)")
    left_out = [*unread, *(f"{name} (of turns)" for name in unread_of_turns)]
    if left_out:
        more = f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
        note(f"{origin}: not read: {', '.join(left_out[:LISTED])}{more}; to join columns: --columns prompt=A+B")
    return rows, ids if "id" in given else None


def _says(name: str, value: Any, used: Sequence[str]) -> bool:
    """Whether a column that is not used holds more than a number: text, a list, or a flag that leaves the row out."""
    if name in used or name.strip().lower() in NAMES:
        return False
    if name.strip().lower() in FLAGS and not isinstance(value, str):
        return value is not None and value != 1
    if not isinstance(value, str):
        return isinstance(value, list | tuple | Mapping) and len(value) > 0
    try:
        float(value or 0)
    except ValueError:
        return True
    return False


def _check_characters(row: Mapping[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds half a character (a lone surrogate), which is not text.",
            given=ascii(error.object[max(0, error.start - 30) : error.end + 30]),
            accepted="Unicode text; JSON writes a character past \\uffff as two escapes, such as \\ud83d\\ude42",
            fix="leave the row out, or mend its text: text.encode('utf-8', 'replace').decode()",
        ) from error


def _check_roles(columns: Mapping[str, str]) -> None:
    for role in columns:
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            raise UsageError(
                f"A column can't be the part {role!r}.",
                given=f"columns={dict(columns)}",
                accepted=", ".join(ROLES),
                fix=f'did you mean "{near[0]}"?' if near else 'write part first, then column: {"prompt": "Input"}',
            )
    shape = columns.keys() & {"text", "prompt", "completion", "messages"}
    if shape and shape not in SHAPES:
        raise UsageError(
            f"The parts {', '.join(sorted(shape))} don't make a row together.",
            given=f"columns={dict(columns)}",
            accepted="text; prompt and completion; or messages",
        )


def _check_names(columns: Mapping[str, str], records: Sequence[Record], origin: str) -> None:
    """Every column that the user named must be somewhere in the data."""
    if not columns:
        return
    known = dict.fromkeys(name for record in records for name in record)
    for role, column in columns.items():
        for name in _split(column, known):
            if name not in known:
                sample = {key: next(r[key] for r in records if key in r) for key in known}
                near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
                mended = {**columns, role: near[0]} if near else propose(sample)
                raise column_error(f"{origin} has no column {name!r}.", sample, mended)


def _guess(names: tuple[str, ...], record: Record, origin: str) -> dict[str, str]:
    """Take the first of the well-known mappings whose columns are all there."""
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    for guess in GUESSES:
        wanted = {role: column.split("+") for role, column in guess.items()}
        if all(name in by_lower for parts in wanted.values() for name in parts):
            mapping = {role: "+".join(by_lower[name] for name in parts) for role, parts in wanted.items()}
            along = {role: by_lower[role] for role in COMPANIONS if role in by_lower}
            return mapping | {role: name for role, name in along.items() if isinstance(record[name], COMPANIONS[role])}
    if "input_ids" in by_lower:
        raise ColumnError(
            f"{origin} holds token ids, and whence reads text.",
            given=f"columns {', '.join(names)}",
            accepted="the data as it was before it was tokenised; whence tokenises, and finds what is in the loss, by itself",
            fix='the rows before map(), or their text: {"text": tokenizer.decode(row["input_ids"])}',
        )
    raise column_error(f"No column of {origin} has a name that says what it is.", record, propose(record))


def is_known(names: Sequence[str]) -> bool:
    """Whether well-known columns are among these, from which the content can be guessed."""
    lower = {name.strip().lower() for name in names}
    return any(all(name in lower for column in guess.values() for name in column.split("+")) for guess in GUESSES)


def propose(sample: Record) -> dict[str, str]:
    """Propose a mapping that might be meant: the longest text, or the two longest if they are of a kind."""
    texts = sorted((name for name, value in sample.items() if isinstance(value, str)), key=lambda n: -len(sample[n]))
    texts = [name for name in texts if " " in sample[name]] or texts
    if not texts:
        turns = next((name for name, value in sample.items() if is_turns(value)), None)
        return {"text": "COLUMN"} if turns is None else {"messages": turns}
    if len(texts) == 1 or len(sample[texts[0]]) > 4 * len(sample[texts[1]]):
        return {"text": texts[0]}
    prompt, completion = sorted(texts[:2], key=list(sample).index)
    return {"prompt": prompt, "completion": completion}


def column_error(what: str, sample: Record, mapping: Mapping[str, str]) -> ColumnError:
    """Say what is wrong with the columns, show them with a sample, and propose a mapping to paste."""
    shown = "; ".join(f"{name}: {_clip(value)}" for name, value in sample.items())
    options = " ".join(command("--columns", f"{role}={column}") for role, column in mapping.items())
    return ColumnError(
        what,
        given=f"columns {shown}",
        accepted="any column, once you name its part: text; prompt, completion; messages; source; id",
        fix=f"columns={json.dumps(dict(mapping), ensure_ascii=False)}    (command line: {options})",
    )


def _clip(value: Any, width: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 1] + "…"


def _split(column: str, known: Mapping[str, Any]) -> list[str]:
    return [column] if column in known else column.split("+")


def _value(record: Record, role: str, column: str, where: str, unread: dict[str, None]) -> Any:
    """Take what the record holds for a role, checked; None where an optional part is missing."""
    parts = [record.get(name) for name in _split(column, record)]
    if len(parts) > 1:
        parts = [part for part in parts if part not in (None, "")]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
        parts = [part for part in parts if not isinstance(part, str)]
    value = parts[0] if parts else ""
    if role in ("id", "source", "label") and isinstance(value, str | int | float):
        return value if role == "label" else str(value)
    if value is None and role in ("completion", "source", "contrast", "span"):
        return None
    if role == "messages" or (role in ("prompt", "completion", "contrast") and is_turns(value)):
        return read_turns(value, where, unread)
    if not isinstance(value, str):
        raise UsageError(
            f"{where} has no text in column {column!r}.",
            given=f"{_clip(value)} (type {'null' if value is None else type(value).__name__})",
            accepted=f"a string for {role}",
            fix="leave the row out, or turn the value into text before loading",
        )
    return value
