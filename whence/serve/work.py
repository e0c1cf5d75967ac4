"""A job: work in a process of its own, which continues when the server or the page is gone.

    python -m whence.serve.work FOLDER

The folder says what to do (`job.json`); what happens is appended to `events.jsonl` there, and what is said to `log.txt`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import WhenceError
from whence.progress import Stage, report_to
from whence.serve.opening import Opening
from whence.shortage import shortage
from whence.store.plain import encoded

if TYPE_CHECKING:
    from whence.pipeline.work import Workshop
    from whence.serve.requests import Question

EVENTS = "events.jsonl"
EVERY = 0.25
"""Seconds between two events of a stage."""


def main(folder: Path) -> int:
    """Do the job; the exit code is 0 where it is done."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with (folder / EVENTS).open("ab", buffering=0) as file:
        events = Events(file)
        events.write("begin", attempt=job["attempt"])
        try:
            with report_to(events):
                result = WORK[job["kind"]](Opening(**job["opening"]), job["settings"])
        except Exception as raised:
            error = shortage(raised) or raised
            if not isinstance(error, WhenceError):
                traceback.print_exc()
                events.write("failed", error={"what": f"{type(error).__name__}: {error}"})
                return 1
            names = ("what", "given", "accepted", "fix", "code")
            events.write("failed", error={name: getattr(error, name) for name in names})
            return 1
        events.write("done", result=result)
    return 0


class Events:
    """Writes the progress of all stages to a file, a line each; whoever reads it may come and go."""

    def __init__(self, file: Any):
        self.file, self.said = file, 0.0

    def write(self, event: str, **more: Any) -> None:
        """One line, at once: a process that is killed leaves whole lines."""
        self.file.write(encoded({"event": event, "at": time.time(), **more}) + b"\n")

    def begin(self, stage: Stage) -> None:
        self._stage(stage)

    def advance(self, stage: Stage) -> None:
        if time.monotonic() - self.said >= EVERY:
            self._stage(stage)

    def end(self, stage: Stage) -> None:
        self._stage(stage)

    def note(self, text: str) -> None:
        self.write("note", text=text)

    def _stage(self, stage: Stage) -> None:
        self.said = time.monotonic()
        told = {name: getattr(stage, name) for name in ("name", "done", "total", "unit", "left", "elapsed")}
        self.write("stage", stage=told)


def _fit(opening: Opening, settings: Mapping[str, Any]) -> Any:
    run = opening.open()
    if run.resolved is not None:
        return _stages(opening, {"stages": ["fit"]})
    run.fit(**settings)
    return None


def _index(opening: Opening, settings: Mapping[str, Any]) -> Any:
    opening.open().build_index(**settings)


def _self(opening: Opening, settings: Mapping[str, Any]) -> Any:
    opening.open().self_influence(**settings)


def _score(opening: Opening, settings: Mapping[str, Any]) -> Any:
    from whence.pipeline.work import Workshop
    from whence.serve.requests import Question
    from whence.settings import Measured

    asked, run = Question(**settings), opening.open()
    if run.resolved is not None and run.resolved.config.stages:
        return {"key": f"scores:{_through(Workshop.of(run.resolved), asked)}:0"}
    queries = run.question(asked.prompt, asked.completion, contrast=asked.contrast, span=asked.span)
    asking = Measured(damping=asked.damping, measurement=asked.measurement)
    scores = run.score(queries, run.scoring.changed(per="token"), asking=asking)
    folder = run.folder_of(scores)
    return {"key": f"scores:{folder.name}:0" if folder else None}


def _through(run: Workshop, asked: Question) -> str:
    """Score the rows of all trainings of a run; the name of the folder."""
    from whence.run import ASKED
    from whence.stages import multistage
    from whence.store.digest import fingerprint_settings

    queries = run.question(asked.prompt, asked.completion, contrast=asked.contrast, span=asked.span)
    name, chosen = f"trace-{fingerprint_settings(asked.key)[:8]}", run.scoring.changed(per="token", n_train=None)
    multistage(run.stages, queries, chosen, damping=asked.damping, out=run.out / ASKED / name)
    return name


def _validate(opening: Opening, settings: Mapping[str, Any]) -> Any:
    return {"badge": opening.open().check(**settings).about["badge"]}


def _stages(opening: Opening, settings: Mapping[str, Any]) -> Any:
    from whence.pipeline import run_pipeline

    resolved = opening.open().resolved
    assert resolved is not None  # it was looked at before the job was made
    steps = run_pipeline(resolved, settings["stages"])
    return {"stages": [{"stage": step.stage.name, "state": step.state} for step in steps]}


WORK: Mapping[str, Callable[[Opening, Mapping[str, Any]], Any]] = {
    "fit": _fit,
    "index": _index,
    "self": _self,
    "score": _score,
    "validate": _validate,
    "run": _stages,
}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
