"""Rows of the training data, and what was decided about them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from whence.serve.answers import Json, download
from whence.serve.requests import Decision, Question
from whence.serve.routes import Limit, Offset
from whence.serve.server import Served

router = APIRouter()

Decided = Literal["any", "yes", "no", "drop", "keep", "fix", "unsure"]


@router.get("/api/data")
async def data(
    server: Served,
    offset: Offset = 0,
    limit: Limit = 50,
    sort: Literal["row", "self", "length"] = "row",
    search: Annotated[str, Query(max_length=1000)] = "",
    source: str | None = None,
    decided: Decided = "any",
) -> Json:
    asked = (offset, limit, sort, search, source, decided)
    found = await run_in_threadpool(server.browser.page, *asked)
    return Json(found | {"copy": server.commands.rows(server.warm.home("self"), *asked)})


@router.get("/api/data/row")
async def row(server: Served, request: Request, id: str) -> Json:
    return await server.work(request, server.browser.row, id)


@router.get("/api/data/neighbours")
async def near(server: Served, request: Request, id: str, top: Annotated[int, Query(ge=1, le=50)] = 5) -> Json:
    def sides() -> Any:
        asked = server.asking.ask(Question(row=id, top=top))
        query = server.asking.document(asked, top, server.decided())["query"]
        return {"helps": query["raises"], "hurts": query["lowers"]}

    return await server.work(request, sides)


@router.get("/api/review")
async def review(server: Served, offset: Offset = 0, limit: Limit = 20, decided: Decided = "no") -> Json:
    found = await run_in_threadpool(server.browser.review, offset, limit, decided)
    return Json(found | {"copy": server.commands.rows(server.warm.home("self"), offset, limit, "self", decided=decided)})


@router.get("/api/decisions")
async def decisions(server: Served) -> Json:
    kept = server.decisions
    return Json({"decisions": kept.current(), "events": len(kept.events), "progress": server.browser.progress()})


@router.post("/api/decisions")
async def decide(server: Served, body: Decision) -> Json:
    server.asking.number(body.id)
    made = await run_in_threadpool(server.decisions.decide, body.id, body.verdict, body.why, body.who)
    return Json({"decision": made, "progress": server.browser.progress()})


@router.post("/api/decisions/undo")
async def undo(server: Served) -> Json:
    undone = await run_in_threadpool(server.decisions.undo)
    return Json({"undone": undone, "progress": server.browser.progress()})


@router.get("/api/decisions/droplist")
async def drop_list(server: Served, form: Literal["txt", "jsonl", "kept"] = "txt") -> Response:
    content = await run_in_threadpool(server.browser.drop_list, form)
    name = "kept.jsonl" if form == "kept" else f"drop.{form}"
    return download(content, name, "text/plain; charset=utf-8" if form == "txt" else "application/jsonl")
