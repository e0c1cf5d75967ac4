"""Of the run and its neighbours, and what happens to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from whence.serve.answers import Json
from whence.serve.jobs import OVER
from whence.serve.server import Served, said

router = APIRouter()


@router.get("/api/run")
async def run(server: Served) -> Json:
    return Json(await run_in_threadpool(server.warm.facts))


@router.get("/api/runs")
async def runs(server: Served) -> Json:
    from whence.serve.neighbours import neighbours

    out = server.run.out
    assert out is not None, "a run without a folder is refused when it is opened"
    return Json({"runs": await run_in_threadpool(neighbours, out)})


@router.get("/api/events", response_class=EventSourceResponse)
async def events(server: Served) -> AsyncIterator[ServerSentEvent]:
    queue: asyncio.Queue[ServerSentEvent] = asyncio.Queue(100)
    server.hearers.add(queue)
    try:
        yield said("run", await run_in_threadpool(server.warm.facts))
        for job in server.started_jobs.documents() if server.started_jobs else ():
            if job["state"] not in OVER:
                yield said("job", job)
        while True:
            yield await queue.get()
    finally:
        server.hearers.discard(queue)
