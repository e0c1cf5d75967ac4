"""Conversations as they are written down elsewhere, as turns of `{"role", "content"}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from whence.errors import UsageError

Turn = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
    **{name: name for name in ("system", "developer")},
}
"""What the speakers of conversations are called, in lower case, and the roles of chat templates."""

CALLS = ("tool_calls", "function_call")

KEPT = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""What a turn may have beside role and content, for the chat template to write."""

FLAGS = ("weight", "train", "training", "trainable", "loss", "learn")
"""What a turn may be left out of the loss by: 0 or false."""


def read_turns(value: Any, where: str, unread: dict[str, None]) -> list[Turn]:
    """Read a conversation: turns with `role` and `content`, or `from` and `value`; as a list, as JSON, or as lists by field.

    A turn that is not to be trained on has `"train": False`. What a turn holds beside that and is not read is added to
    `unread`. Raises `UsageError`, which begins with `where`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise _no_conversation(where, value) from None
    if isinstance(value, Mapping) and value and all(isinstance(field, list | tuple) for field in value.values()):
        if len({len(field) for field in value.values()}) > 1:
            raise _no_conversation(where, value)
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return [_turn(turn, value, where, unread) for turn in (value if isinstance(value, list | tuple) else [value])]


def _turn(turn: Any, conversation: Any, where: str, unread: dict[str, None]) -> Turn:
    turn = {key: item for key, item in turn.items() if item is not None} if isinstance(turn, Mapping) else {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value", turn.get("text")))
    if content is None and any(turn.get(key) for key in CALLS):
        content = ""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and content[0].get("type") == "text":
        content = content[0].get("text")
    if not isinstance(role, str) or not isinstance(content, str):
        raise _no_conversation(where, conversation)
    read: Turn = {"role": ROLES.get(role.strip().lower(), role), "content": content}
    if turn.get("function_call") and not turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    names = (*KEPT, "name") if read["role"] == "tool" else KEPT
    read |= {name: _without_nulls(turn[name]) for name in names if turn.get(name)}
    read |= _flag(turn, where) if read["role"] == "assistant" else {}
    unread |= dict.fromkeys(sorted(turn.keys() - {"role", "from", "content", "value", "text", *names, *FLAGS, "masked"}))
    if read["role"] not in ROLES.values():
        unread[f"{role!r}, which is not a role of chat templates"] = None
    if read["role"] != "assistant" and any(turn.get(name) in (1, True) for name in FLAGS):
        unread[f"the wish to train on a turn of {role!r}"] = None
    return read


def _flag(turn: Mapping[str, Any], where: str) -> Turn:
    """Whether the turn is left out of the loss; a weight between that and 1 can't be honoured."""
    flags = {name: turn[name] for name in FLAGS if name in turn}
    if "masked" in turn:
        flags["masked"] = turn["masked"]
    strange = {name: flag for name, flag in flags.items() if flag not in (0, 1)}
    if strange:
        name, flag = next(iter(strange.items()))
        raise UsageError(
            f"{where} gives a turn the {name} {flag!r}, and a turn is in the loss or it is not.",
            given=json.dumps(dict(turn), ensure_ascii=False, default=str)[:200],
            accepted="1 or true, 0 or false",
            fix="train with such turns repeated, or leave the flag out",
        )
    silent = any(bool(flag) == (name == "masked") for name, flag in flags.items())
    return {"train": False} if silent else {}


def _without_nulls(value: Any) -> Any:
    """Leave out what a table's columns add to calls that don't have it."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def read_tools(value: Any, where: str) -> list[Any]:
    """Read the functions that a conversation may call, as a list or as JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError):
        tools = None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UsageError(
            f"{where} has tools that are not descriptions of functions.",
            given=str(value)[:200],
            accepted='a list such as [{"type": "function", "function": {"name": "...", "parameters": {...}}}], or that as JSON',
        )
    return _without_nulls(tools)


def is_turns(value: Any) -> bool:
    """Whether the value is turns where a text might stand."""
    turns = value if isinstance(value, list | tuple) else [value]
    return bool(turns) and all(isinstance(turn, Mapping) and turn.keys() & {"role", "from"} for turn in turns)


def joined(row: dict[str, Any]) -> dict[str, Any]:
    """Make one conversation of a prompt and a completion that are turns; only those of the completion are in the loss."""
    rest = {role: value for role, value in row.items() if role not in ("prompt", "completion")}
    before, after = row["prompt"], row.get("completion", [])
    asked = [{"role": "user", "content": before}] if isinstance(before, str) else before
    said = [{"role": "assistant", "content": after}] if isinstance(after, str) else after
    asked = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in asked]
    if not isinstance(rest.get("contrast", ""), str):
        rest["contrast"] = rest["contrast"][-1]["content"]
    return {"messages": [*asked, *said], **rest}


def with_context(row: dict[str, Any], record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Sequence[str]]:
    """Give a conversation the system's words and the tools that stand in columns beside it; says which columns were read."""
    read: list[str] = []
    for name, value in record.items():
        lower = name.strip().lower()
        if lower in ("system", "system_prompt") and isinstance(value, str) and value.strip():
            turns = row["messages"]
            if not turns or turns[0]["role"] not in ("system", "developer"):
                row = {**row, "messages": [{"role": "system", "content": value}, *turns]}
                read.append(name)
            elif turns[0]["content"].strip() == value.strip():
                read.append(name)
        elif lower in ("tools", "functions") and value not in (None, "", [], "[]"):
            row = {**row, "tools": read_tools(value, where)}
            read.append(name)
    return row, read


def _no_conversation(where: str, value: Any) -> UsageError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return UsageError(
        f"{where} holds no conversation.",
        given=text if len(text) <= 120 else text[:119] + "…",
        accepted='[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or from and value',
        fix="leave the row out, or name another column: --columns messages=COLUMN",
    )
