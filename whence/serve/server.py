"""What the routes stand on: the run that is served, its jobs, the pages that listen, and the one thread that works."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.sse import ServerSentEvent

from whence.serve.answers import Json
from whence.serve.jobs import Jobs
from whence.serve.lacking import Lacking
from whence.serve.opening import Opening
from whence.serve.warm import Busy, Warm
from whence.store.plain import encoded

if TYPE_CHECKING:
    from whence.fitting.curvature import Curvature
    from whence.run import Run
    from whence.serve.asked import Asked
    from whence.serve.asking import Asking
    from whence.serve.commands import Commands
    from whence.serve.decisions import Decisions
    from whence.serve.rows import Browser
    from whence.serve.state import State

COMING = "ask again in a moment"


class Server:
    """One run, opened when the server starts; `said` hears why that failed."""

    def __init__(self, opening: Opening, said: Callable[[str], None]):
        self.opening, self.said = opening, said
        self.warm = Warm(opening, lambda: self.tell("run", self.warm.facts))
        self.hearers: set[asyncio.Queue[ServerSentEvent]] = set()
        self.started_jobs: Jobs | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    @contextlib.asynccontextmanager
    async def life(self, app: FastAPI) -> AsyncIterator[None]:
        """From the first request to the last."""
        self.loop = asyncio.get_running_loop()
        task = asyncio.create_task(self._open())
        yield
        task.cancel()
        self.warm.close()

    async def _open(self) -> None:
        """Open the run, then watch its jobs."""
        warm = self.warm
        await asyncio.wrap_future(warm.start())
        if warm.error:
            self.said("\n".join(filter(None, (warm.error.get(key) for key in ("what", "given", "accepted", "fix")))))
        if warm.state is None:
            return

        def over(job: dict[str, Any]) -> None:
            if job["state"] == "done":
                warm.worker.submit(warm.refresh, job)

        staged = warm.run is not None and warm.run.resolved is not None
        self.started_jobs = Jobs(self.opening, warm.state, staged, lambda job: self.tell("job", lambda: job), over)
        await self.started_jobs.watch()

    # what there is once the run is open: each raises Busy before, and Lacking where it could not be opened

    @property
    def run(self) -> Run:
        """The run."""
        return self._ready("run")

    @property
    def asking(self) -> Asking:
        """Its model, that is asked."""
        return self._ready("asking")

    @property
    def browser(self) -> Browser:
        """Its rows."""
        return self._ready("browser")

    @property
    def decisions(self) -> Decisions:
        """What was decided about rows."""
        return self._ready("decisions")

    @property
    def state(self) -> State:
        """What was asked."""
        return self._ready("state")

    @property
    def commands(self) -> Commands:
        """How to get elsewhere what it shows."""
        from whence.serve.commands import Commands  # with torch

        return Commands(self.opening, self.run)

    @property
    def jobs(self) -> Jobs:
        """Its jobs."""
        self._ready("state")
        if self.started_jobs is None:
            raise Busy("The run is being opened.", fix=COMING)
        return self.started_jobs

    @property
    def curvature(self) -> Curvature:
        """Its factors. Raises Lacking where there are none."""
        if "curvature" not in vars(self.run):
            raise Lacking("There are no factors yet.", job="fit", fix="start the job here")
        return self.run.curvature

    def _ready(self, name: str) -> Any:
        warm = self.warm
        if (part := getattr(warm, name)) is None:
            if warm.error:
                raise Lacking(**{key: warm.error.get(key) or "" for key in ("what", "given", "accepted", "fix")})
            raise Busy(f"The run is being opened ({warm.what}).", fix=COMING)
        return part

    # work with the model, in its thread

    async def work(self, request: Request, function: Callable[..., Any], *arguments: Any) -> Json:
        """What the function returns, called in the thread that has the model; nothing if nobody is waiting for it any more."""
        return Json(await self.made(request, function, *arguments))

    async def made(self, request: Request, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same, not yet as JSON."""
        self._ready("asking")
        return await self.warm.work(function, *arguments, gone=request.is_disconnected)

    def asked(self, key: str) -> Asked:
        """A question by its key."""
        return self.asking.known(key, self.state.question)

    def document(self, found: Asked, top: int, where: Sequence[str]) -> Any:
        """What the page shows of a question, with how to get it elsewhere."""
        document = self.asking.document(found, top, self.decided(), where)
        return document | {"copy": self.commands.question(found, top, where)}

    def decided(self) -> dict[str, Any]:
        """The decisions that hold."""
        return self.warm.decisions.current() if self.warm.decisions is not None else {}

    # pages that listen

    def tell(self, event: str, make: Callable[[], Any]) -> None:
        """Tell all pages, from whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            assert self.loop is not None
            self.loop.call_soon_threadsafe(lambda: self._send(event, make()))

    def _send(self, event: str, value: Any) -> None:
        """Tell all pages; one that does not listen misses the oldest."""
        for queue in self.hearers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(said(event, value))


def said(event: str, value: Any) -> ServerSentEvent:
    """An event with its value as JSON."""
    return ServerSentEvent(event=event, raw_data=encoded(value).decode())


async def _server(request: Request) -> Server:
    return request.app.state.server


Served = Annotated[Server, Depends(_server)]
"""The server, as a parameter of a route."""
