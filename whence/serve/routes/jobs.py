"""Jobs: fits, scores, indices and checks, in processes of their own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from whence.serve.answers import Json
from whence.serve.requests import NewJob
from whence.serve.server import Served

router = APIRouter()


@router.get("/api/jobs")
async def all_jobs(server: Served) -> Json:
    return Json({"jobs": server.jobs.documents()})


@router.post("/api/jobs")
async def new_job(server: Served, body: NewJob) -> Json:
    return Json(server.jobs.create(body), status_code=201)


@router.get("/api/jobs/{number}")
async def job(server: Served, number: int) -> Json:
    return Json(server.jobs.document(number))


@router.post("/api/jobs/{number}/cancel")
async def cancel(server: Served, number: int) -> Json:
    return Json(await run_in_threadpool(server.jobs.cancel, number))


@router.post("/api/jobs/{number}/resume")
async def resume(server: Served, number: int) -> Json:
    return Json(server.jobs.resume(number))


@router.get("/api/jobs/{number}/log")
async def log(server: Served, number: int, tail: Annotated[int, Query(ge=1, le=10_000)] = 200) -> Json:
    return Json({"lines": server.jobs.log(number, tail)})
