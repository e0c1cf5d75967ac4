"""What the server remembers over restarts: the questions that were asked, and the jobs, in one file of SQLite."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whence.serve.requests import Pin, Question

HOME, FILE = "serve", "state.sqlite"
"""Below the folder of the run."""

TABLES = """
CREATE TABLE IF NOT EXISTS asked (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, made TEXT NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
    note TEXT NOT NULL DEFAULT '', rows TEXT NOT NULL DEFAULT '[]'
);
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, settings TEXT NOT NULL, state TEXT NOT NULL,
    created TEXT NOT NULL, started TEXT, ended TEXT, attempt INTEGER NOT NULL DEFAULT 0, pid INTEGER, born REAL
);
"""


def now() -> str:
    """The time, as files and pages have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class State:
    """The database; every call is a transaction of its own, from any thread."""

    def __init__(self, folder: Path):
        self.folder = folder / HOME
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.connection = sqlite3.connect(self.folder / FILE, check_same_thread=False)
        self.connection.row_factory = sqlite3.Row
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.executescript(TABLES)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def remember(self, question: Question) -> None:
        """Keep a question; one that was asked before becomes the newest."""
        text = question.model_dump_json()
        self._write(
            "INSERT INTO asked (key, question, made) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET made = excluded.made",
            question.key,
            text.encode("utf-8", "replace").decode(),
            now(),
        )

    def question(self, key: str) -> Question | None:
        """A question that was asked, by its key."""
        found = self._read("SELECT question FROM asked WHERE key = ?", key)
        return Question.model_validate_json(found[0]["question"]) if found else None

    def asked(self) -> list[dict[str, Any]]:
        """All questions, the newest first."""
        return [self._entry(row) for row in self._read("SELECT * FROM asked ORDER BY made DESC")]

    def pin(self, key: str, pin: Pin) -> dict[str, Any] | None:
        """Keep a note and rows beside a question; None where it was not asked."""
        rows = json.dumps([row.model_dump() for row in pin.rows])
        self._write("UPDATE asked SET pinned = ?, note = ?, rows = ? WHERE key = ?", int(pin.pinned), pin.note, rows, key)
        found = self._read("SELECT * FROM asked WHERE key = ?", key)
        return self._entry(found[0]) if found else None

    def forget(self, key: str) -> None:
        """Remove a question from the list."""
        self._write("DELETE FROM asked WHERE key = ?", key)

    @staticmethod
    def _entry(row: sqlite3.Row) -> dict[str, Any]:
        question = json.loads(row["question"])
        kept = {"key": row["key"], "when": row["made"], "pinned": bool(row["pinned"]), "note": row["note"]}
        return {**question, **kept, "rows": json.loads(row["rows"])}

    def add_job(self, kind: str, settings: Mapping[str, Any]) -> int:
        """A job that waits."""
        given = json.dumps(settings)
        return self._write("INSERT INTO jobs (kind, settings, state, created) VALUES (?, ?, 'queued', ?)", kind, given, now())

    def change_job(self, number: int, **columns: Any) -> None:
        """Write down what became of a job."""
        names = ", ".join(f"{name} = ?" for name in columns)
        self._write(f"UPDATE jobs SET {names} WHERE id = ?", *columns.values(), number)

    def jobs(self, state: str | None = None) -> list[dict[str, Any]]:
        """All jobs, or those in a state; the newest first."""
        where, given = ("", ()) if state is None else ("WHERE state = ?", (state,))
        found = self._read(f"SELECT * FROM jobs {where} ORDER BY id DESC", *given)
        return [{**row, "settings": json.loads(row["settings"])} for row in map(dict, found)]

    def job(self, number: int) -> dict[str, Any] | None:
        """One job."""
        found = self._read("SELECT * FROM jobs WHERE id = ?", number)
        return {**dict(found[0]), "settings": json.loads(found[0]["settings"])} if found else None

    def _write(self, statement: str, *values: Any) -> int:
        with self.lock, self.connection, closing(self.connection.execute(statement, values)) as cursor:
            return cursor.lastrowid or 0

    def _read(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self.lock, closing(self.connection.execute(statement, values)) as cursor:
            return cursor.fetchall()
