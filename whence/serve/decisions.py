"""What people decide about training rows: a file that only grows, `decisions.jsonl` in the folder of the run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whence.data import Rows
from whence.serve.lacking import Lacking
from whence.store.plain import encoded

FILE = "decisions.jsonl"


def parted(rows: Rows, current: Mapping[str, Any]) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """By the verdicts that stand: ids of the rows to leave out, and the rows that stay, each with its id."""
    dropped = [name for name in rows.ids if (current.get(name) or {}).get("verdict") == "drop"]
    left = set(dropped)
    return dropped, ({"id": name, **row} for name, row in zip(rows.ids, rows, strict=True) if name not in left)


class Decisions:
    """The events of a file, and what they come to: the last verdict on each row. An undo is an event, too."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.events: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.events = [event for line in lines if (event := _event(line)) is not None]

    def decide(self, name: str, verdict: str, why: str = "", who: str = "") -> dict[str, Any]:
        """Write down a verdict on a row."""
        return self._append({"id": name, "verdict": verdict, "why": why, "who": who})

    def undo(self) -> dict[str, Any]:
        """Undo the last verdict that still holds. Raises Lacking where there is none."""
        with self.lock:
            standing = self._standing()
        if not standing:
            raise Lacking("There is no decision to undo.")
        self._append({"undo": standing[-1]["number"]})
        return standing[-1]

    def current(self) -> dict[str, dict[str, Any]]:
        """The verdict that stands, by row."""
        with self.lock:
            return {event["id"]: event for event in self._standing()}

    def history(self, name: str) -> list[dict[str, Any]]:
        """All that was decided about a row, in order; `undone` says what was undone."""
        with self.lock:
            undone = {event["undo"] for event in self.events if "undo" in event}
            return [{**event, "undone": event["number"] in undone} for event in self.events if event.get("id") == name]

    def _standing(self) -> list[dict[str, Any]]:
        undone = {event["undo"] for event in self.events if "undo" in event}
        return [event for event in self.events if "id" in event and event["number"] not in undone]

    def _append(self, event: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            event = {"number": len(self.events) + 1, "when": datetime.now(UTC).isoformat(timespec="seconds"), **event}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # by a kill in the middle of a line
            with self.path.open("ab") as file:
                file.write(b"\n" * (cut and self.path.stat().st_size > 0) + encoded(event) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self.events.append(event)
            return event


def _event(line: str) -> dict[str, Any] | None:
    """The event of a line; None for one that was cut off."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "number" in event and ("id" in event or "undo" in event) else None
