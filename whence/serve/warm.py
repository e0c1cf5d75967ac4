"""A run that stays open: its model, factors and index in memory, one thread that works with them, and what is known of it."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.errors import UsageError, WhenceError
from whence.progress import Silent, report_to
from whence.serve.decisions import FILE, Decisions
from whence.serve.opening import Opening
from whence.serve.requests import Question
from whence.serve.state import State
from whence.shortage import shortage
from whence.store.intact import MANIFEST
from whence.store.plain import plain
from whence.version import __version__

if TYPE_CHECKING:
    from whence.run import Run
    from whence.serve.asked import Asked
    from whence.serve.asking import Asking
    from whence.serve.rows import Browser

WAITING = 256
"""Questions that may wait for the one thread."""

FORMULA = (
    "If one more copy of the row z were in the training data, the weights that training ends in would move by about "
    "(1/N) (G + damping)^-1 grad log p(z): the less, the more the other rows have to say in that direction. log p(answer) "
    "changes by its gradient times that move: influence = grad log p(answer)^T (G + damping)^-1 grad log p(z) / N, in nats "
    "per copy. It is the classic -grad L(query)^T H^-1 grad L(z) with the sign turned, so that positive raises log p."
)
"""What is computed, in sentences."""


class Busy(WhenceError):
    """Come again."""


class Warm:
    """One run, opened in the thread that works with it; `changed()` hears when more is known of it."""

    def __init__(self, opening: Opening, changed: Callable[[], None]):
        self.opening, self.changed = opening, changed
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.waiting = 0
        self.state: State | None = None
        self.run: Run | None = None
        self.asking: Asking | None = None
        self.browser: Browser | None = None
        self.decisions: Decisions | None = None
        self.error: dict[str, Any] | None = None
        self.what, self.since = "libraries", time.monotonic()
        self.known: dict[str, Any] = {}

    def start(self) -> Future[None]:
        """Begin to load; what is there can be asked at once."""
        return self.worker.submit(self._load)

    async def work(self, function: Callable[..., Any], *arguments: Any, gone: Callable[[], Any] | None = None) -> Any:
        """What a function gives in the thread of the model; `gone` tells that nobody is waiting for it. Raises Busy."""
        if self.waiting >= WAITING:
            raise Busy("Too many questions are waiting.", accepted=f"at most {WAITING} at a time", fix="ask again in a moment")
        self.waiting += 1
        future = asyncio.wrap_future(self.worker.submit(_quietly, function, *arguments))
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=0.5)
                if gone is not None and not future.done() and await gone():
                    future.cancel()
                    raise Busy("Nobody is waiting for this answer any more.")
            return future.result()
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Let go of everything."""
        self.worker.shutdown(wait=False, cancel_futures=True)
        if self.state is not None:
            self.state.close()

    # in the worker's thread

    def _load(self) -> None:
        try:
            with report_to(Silent()):
                self._open()
        except Exception as raised:
            error = shortage(raised) or raised
            if not isinstance(error, WhenceError):
                traceback.print_exception(error)
                self.error = {"what": f"{type(error).__name__}: {error}"}
                self.changed()
                return
            self.error = {name: getattr(error, name) for name in ("what", "given", "accepted", "fix", "code")}
        self.changed()

    def _open(self) -> None:
        from whence.serve.asking import Asking

        self._now("run")
        run = self.opening.open()
        assert run.out is not None  # `Opening.open` sees to it
        self.decisions = self.decisions or Decisions(run.out / FILE)
        self.state = self.state or State(run.out)
        self.run = run
        self._now("data")
        self.asking = Asking(run)
        self._browse()
        self._now("model")
        _refuse_pickles(run.name)
        run.loaded  # noqa: B018
        self._now("factors")
        self._read("factors", "index")
        self.what = ""

    def _now(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()
        self.changed()

    def _read(self, *names: str) -> None:
        """Take factors and index from their folders, where they are finished."""
        assert self.run is not None and self.asking is not None
        for name, attribute in (("factors", "curvature"), ("index", "index")):
            if name in names and self.home(name) is not None:
                vars(self.run).pop(attribute, None)
                getattr(self.run, attribute)
        self.asking.operators.clear()
        self.asking.asked.clear()

    def _browse(self) -> None:
        from whence.serve.rows import Browser
        from whence.store.scores import open_scores

        assert self.run is not None and self.asking is not None and self.decisions is not None
        home = self.home("self")
        self.browser = Browser(self.run, self.asking, self.decisions, open_scores(home) if home else None)

    def refresh(self, job: dict[str, Any]) -> None:
        """Take in what a job has made."""
        with report_to(Silent()):
            if job["kind"] == "run" and job["state"] == "done":
                self._open()
            elif job["kind"] in ("fit", "index"):
                self._read("factors" if job["kind"] == "fit" else "index")
            elif job["kind"] == "self":
                self._browse()
        self.changed()

    def ask(self, question: Question) -> Asked:
        """Ask, and remember that it was asked."""
        assert self.asking is not None and self.state is not None
        found = self.asking.ask(question)
        if found.question is not None:
            self.state.remember(found.question)
        return found

    # what is known

    def home(self, name: str) -> Path | None:
        """The folder of what was made, as far as it is finished: by a stage of the run, or beside."""
        from whence.run import ASKED

        assert self.run is not None and self.run.out is not None
        places = (self.run.out / name, self.run.out / ASKED / name)
        return next((place for place in places if (place / MANIFEST).is_file()), None)

    @property
    def phase(self) -> str:
        """How far it is: "loading", "ready" or "failed"."""
        return "failed" if self.error else "loading" if self.what else "ready"

    def facts(self) -> dict[str, Any]:
        """What pages say of the run; nothing is loaded for it."""
        loading = {"what": self.what, "seconds": time.monotonic() - self.since} if self.phase == "loading" else None
        known = {"version": __version__, "state": self.phase, "loading": loading, "formula": FORMULA}
        known |= {"error": self.error} if self.error else {}
        if self.run is None:
            return {"name": self.opening.name, "folder": self.opening.out, **known}
        try:
            return plain(known | self._facts(self.run))
        except WhenceError as error:  # a damaged file must not hide everything
            return plain({"name": self.opening.name, "folder": str(self.run.out), **known, "damaged": str(error)})

    def _facts(self, run: Run) -> dict[str, Any]:
        from whence.methods.base import recipes
        from whence.report.words import LIMITS, SLOPE
        from whence.serve.asking import ANSWER_TOKENS, METHODS
        from whence.serve.guard import BODY_BYTES

        assert run.out is not None
        loaded, rows = "loaded" in vars(run), vars(run).get("all_rows")
        model: Any = run.model if loaded else None
        parameter = next(model.parameters()) if loaded else None
        homes = {name: self.home(name) for name in ("factors", "index", "self")}
        scored = run.kept_scores()
        newest = max(scored, key=lambda folder: (folder / MANIFEST).stat().st_mtime, default=None)
        curvature, index = vars(run).get("curvature"), vars(run).get("index")
        causal = {"factors": homes["factors"] is not None}
        methods = [{"name": name, "title": METHODS[name][0], "source": METHODS[name][1], "causal": True} for name in METHODS]
        methods += [
            {"name": each.name, "title": each.title, "source": each.source, "causal": False}
            for each in recipes().values()
            if not each.needs or (causal["factors"] and each.needs == ("factors",))
        ]
        return {
            "name": run.resolved.config.run if run.resolved else run.out.name,
            "folder": str(run.out),
            "model": {
                "name": run.name,
                "loaded": loaded,
                "kind": type(model).__name__ if loaded else None,
                "parameters": sum(each.numel() for each in model.parameters()) if loaded else None,
                "device": str(parameter.device) if parameter is not None else None,
                "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
                "chat": bool(rows and "messages" in rows[0]),
            },
            "data": {
                "path": run.reading.path,
                "rows": len(rows) if rows is not None else None,
                "fingerprint": rows.fingerprint if rows is not None else None,
                "n_train": run.n_train or (len(rows) if rows is not None else None),
                "sources": sorted({str(row["source"]) for row in rows if row.get("source") is not None})[:200] if rows else [],
            },
            "dates": {name: _when(home) for name, home in homes.items()} | {"scores": _when(newest)},
            "has": {
                "model": loaded,
                **{name: home is not None for name, home in homes.items()},
                "scores": bool(scored),
                "report": (run.out / "report" / "report.html").is_file(),
                "training": (run.out / "train" / "training.json").is_file(),
                "stages": bool(run.resolved and run.resolved.config.stages),
            },
            "factors": {**{key: curvature.about.get(key) for key in ("method", "examples")}, "modules": len(curvature.blocks)}
            if curvature is not None
            else None,
            "index": None if index is None else _of_index(index, homes["index"]),
            "stages": _stages(run),
            "trust": _trust(newest),
            "methods": methods,
            "limits": {"answer_tokens": ANSWER_TOKENS, "row_tokens": run.reading.max_length, "body_bytes": BODY_BYTES},
            "meaning": SLOPE,
            "cautions": LIMITS,
        }


def _refuse_pickles(model: str | None) -> None:
    """Raise UsageError where the weights in a folder are in files that may hold code."""
    folder = Path(model or "").expanduser()
    if model and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"The weights in {folder} are not in a safetensors file, and the page loads no others.",
            given=", ".join(sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))) or "none",
            accepted="model.safetensors",
            fix="once, with weights that you trust: model.save_pretrained(FOLDER)",
        )


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    with report_to(Silent()):
        return function(*arguments)


def _when(folder: Path | None) -> str | None:
    if folder is None:
        return None
    return datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC).isoformat(timespec="seconds")


def _bytes(folder: Path | None) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder is not None else 0


def _trust(folder: Path | None) -> dict[str, Any] | None:
    from whence.validate.quick import read_quick
    from whence.validate.without import read_beside, read_calibration

    found = read_quick(folder) if folder is not None else None
    if folder is None or found is None:
        return None
    known = read_calibration(folder)
    retrained = {check.capitalize(): each["sentence"] for check, each in read_beside(folder).items()}
    retrained |= {"Size": known["says"]} if known else {}
    return {"badge": found.about["badge"], "checks": found.about["checks"] | retrained, "warnings": found.flags}


def _of_index(index: Any, home: Path | None) -> dict[str, Any]:
    from whence.serve.asking import FIRST, recall

    size = index.about["bytes"] if index.kind == "landmarks" else _bytes(home) / max(1, len(index))
    return {"rows": len(index), "recall": recall(index, FIRST), "bytes_per_row": size}


def _stages(run: Run) -> list[dict[str, Any]]:
    """The stages of a `whence run`, and how far they are."""
    if run.resolved is None:
        return []
    from whence.pipeline.lock import Lock
    from whence.pipeline.stages import active

    lock, found = Lock.read(run.resolved.out), []
    for stage in active(run.resolved.config):
        record = lock.records.get(stage.name)
        files = record.files if record is not None else None
        state = "todo" if record is None else "begun" if files is None else "done"
        sizes = {"files": len(files or {}), "bytes": sum((files or {}).values())}
        found.append({"stage": stage.name, "state": state, "seconds": record.seconds if record else None, **sizes})
    return found
