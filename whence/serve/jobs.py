"""Jobs: one process each, in a group of its own, watched by reading what it writes.

A server that comes back finds its jobs where they are: one that still works is watched again, and one whose process is gone
resumes where it stopped, as the same command in a terminal does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from whence.errors import UsageError
from whence.escapes import command
from whence.serve.lacking import Lacking, NotThere
from whence.serve.opening import Opening
from whence.serve.requests import NewJob, Question
from whence.serve.state import State, now
from whence.serve.work import EVENTS, EVERY
from whence.settings import Fit, Index, Score
from whence.store.files import atomic

NOTES = 20
"""The last of a job that are shown."""

PATIENCE = 5.0
"""Seconds that a job has to end when it is asked to, before it is ended."""

TRIES = 3
"""Times that a job is restarted automatically, when the server comes back."""

OVER = ("done", "failed", "cancelled", "interrupted")

SECTIONS = {"fit": Fit, "index": Index, "self": Score}


@dataclass
class Seen:
    """What has been read of a job's events."""

    offset: int = 0
    stage: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    result: Any = None
    ended: str | None = None
    """"done" or "failed", once the job says so."""


class Jobs:
    """The jobs of a run; `changed(job)` hears of every change, and `ended(job)` of every end."""

    def __init__(
        self,
        opening: Opening,
        state: State,
        staged: bool,
        changed: Callable[[dict[str, Any]], None],
        ended: Callable[[dict[str, Any]], None],
    ):
        self.opening, self.state, self.staged, self.changed, self.ended = opening, state, staged, changed, ended
        self.seen: dict[int, Seen] = {}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    async def watch(self) -> None:
        """Begin what waits and read what is going on, until the task is cancelled."""
        for job in self.state.jobs("running"):
            self._read(job["id"])
            if not self._alive(job) and self.seen[job["id"]].ended is None:
                again = job["attempt"] < TRIES
                self.state.change_job(job["id"], state="queued" if again else "interrupted")
        while True:
            for job in self.state.jobs("running"):
                self._look(job)
            if not self.state.jobs("running") and (waiting := self.state.jobs("queued")):
                self._begin(waiting[-1])
            await asyncio.sleep(EVERY)

    def create(self, new: NewJob) -> dict[str, Any]:
        """A job that waits for its turn. Raises UsageError where its settings are wrong."""
        settings: dict[str, Any] = dict(new.settings)
        if new.kind in SECTIONS:
            section = SECTIONS[new.kind]
            chosen = section().changed(**{name: _tuple(value) for name, value in settings.items()})
            settings = {name: getattr(chosen, name) for name in settings}
        if new.kind == "score":
            settings = Question(**settings).model_dump()
        if new.kind == "validate" and (unknown := settings.keys() - {"sample", "asked", "seed", "lds"}):
            raise UsageError(f"There is no setting {min(unknown)!r} of the quick checks.", accepted="sample, asked, seed, lds")
        if new.kind == "run" or (new.kind == "fit" and self.staged):
            if not self.staged:
                raise UsageError("This run has no whence.yaml.", accepted="fit, index, self, score, validate")
            if settings:
                raise UsageError("The settings of these stages are in the run's whence.yaml.", fix="change them there")
            settings = {"stages": new.stages if new.kind == "run" else ["fit"]}
        number = self.state.add_job("run" if "stages" in settings else new.kind, settings)
        return self._tell(number)

    def document(self, number: int) -> dict[str, Any]:
        """A job as pages see it. Raises NotThere where there is none of that number."""
        job = self.state.job(number)
        if job is None:
            raise NotThere(f"There is no job {number}.")
        self._read(number)
        seen, stage = self.seen[number], None if job["state"] in OVER else self.seen[number].stage
        share = stage["done"] / stage["total"] if stage and stage["total"] else None
        names = ("kind", "settings", "state", "created", "started", "ended", "attempt")
        known = {"id": str(number), **{name: job[name] for name in names}}
        known |= {"pid": job["pid"] if job["state"] == "running" else None, "stage": stage, "share": share}
        ending = {"notes": seen.notes[-NOTES:], "error": seen.error, "result": seen.result}
        return known | ending | {"command": self._command(job)}

    def documents(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        return [self.document(job["id"]) for job in self.state.jobs()]

    def cancel(self, number: int) -> dict[str, Any]:
        """End a job; what it saved stays, and `resume` continues from there."""
        job = self._existing(number)
        if job["state"] in OVER:
            raise Lacking(f"Job {number} is over: {job['state']}.")
        self.state.change_job(number, state="cancelled", ended=now())
        if job["pid"] is not None and self._alive(job):
            _end(job["pid"])
        self.processes.pop(number, None)
        return self._tell(number)

    def resume(self, number: int) -> dict[str, Any]:
        """Restart a job that did not end well; it resumes where it stopped."""
        job = self._existing(number)
        if job["state"] not in OVER or job["state"] == "done":
            raise Lacking(f"Job {number} is {job['state']}.", accepted="one that failed, was cancelled or interrupted")
        self.state.change_job(number, state="queued", ended=None)
        return self._tell(number)

    def log(self, number: int, tail: int) -> list[str]:
        """The last lines printed by a job and the libraries underneath."""
        self._existing(number)
        path = self._folder(number) / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-tail:] if path.exists() else []

    def _existing(self, number: int) -> dict[str, Any]:
        job = self.state.job(number)
        if job is None:
            raise NotThere(f"There is no job {number}.")
        return job

    def _begin(self, job: Mapping[str, Any]) -> None:
        number, attempt = job["id"], job["attempt"] + 1
        folder = self._folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        what = {"kind": job["kind"], "settings": job["settings"], "attempt": attempt, "opening": asdict(self.opening)}
        with atomic(folder / "job.json") as temporary:
            temporary.write_text(json.dumps(what), encoding="utf-8")
        self._read(number)
        self.seen[number] = Seen(offset=self.seen[number].offset)
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "whence.serve.work", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the server's terminal is not for it
            )
        self.processes[number] = process
        born = psutil.Process(process.pid).create_time()
        started = {"started": now(), "ended": None, "attempt": attempt, "pid": process.pid, "born": born}
        self.state.change_job(number, state="running", **started)
        self._tell(number)

    def _look(self, job: Mapping[str, Any]) -> None:
        number = job["id"]
        alive = self._alive(job)  # before reading: what it wrote last is there when it is gone
        news = self._read(number)
        if not alive:
            self.state.change_job(number, state=self.seen[number].ended or "interrupted", ended=now())
            self.processes.pop(number, None)
            self.ended(self._tell(number))
        elif news:
            self._tell(number)

    def _alive(self, job: Mapping[str, Any]) -> bool:
        """Whether the job's process runs; another one may have its number by now."""
        if (process := self.processes.get(job["id"])) is not None:
            return process.poll() is None
        try:
            found = psutil.Process(job["pid"] or -1)
            return abs(found.create_time() - job["born"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return False

    def _read(self, number: int) -> bool:
        """Read on in a job's events; whether there was something."""
        seen, path = self.seen.setdefault(number, Seen()), self._folder(number) / EVENTS
        if not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(seen.offset)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        seen.offset += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            if event["event"] == "begin":
                seen.stage, seen.error, seen.result, seen.ended = None, None, None, None
            elif event["event"] == "stage":
                seen.stage = event["stage"]
            elif event["event"] == "note":
                seen.notes.append(event["text"])
            else:
                seen.ended, seen.error, seen.result = event["event"], event.get("error"), event.get("result")
        return bool(whole)

    def _tell(self, number: int) -> dict[str, Any]:
        job = self.document(number)
        self.changed(job)
        return job

    def _folder(self, number: int) -> Path:
        return self.state.folder / "jobs" / str(number)

    def _command(self, job: Mapping[str, Any]) -> str | None:
        """What one would type in a terminal to the same end; None where there is no such command."""
        words, kind, settings = self.opening.words, job["kind"], job["settings"]
        if kind == "run":
            return command("whence", "run", self.opening.file or Path(self.opening.model) / "whence.yaml", *settings["stages"])
        folder = self.state.folder.parent / "factors"
        return command("whence", "fit", *words, "--out", folder) if kind == "fit" and not settings and len(words) > 1 else None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _end(pid: int) -> None:
    """End a group of processes, at once where it does not do so by itself."""
    try:
        os.killpg(pid, signal.SIGTERM)
        psutil.Process(pid).wait(PATIENCE)
    except psutil.TimeoutExpired:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
