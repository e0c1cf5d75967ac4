"""Answers, the rows behind them, and what more there is to ask about both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from whence.serve.answers import Json, download
from whence.serve.lacking import NotThere
from whence.serve.requests import Cell, Compare, Complete, Demo, Export, Map, Pair, Pin, Question, WhatIf
from whence.serve.routes import Limit, Offset
from whence.serve.server import Served

router = APIRouter()

First = Annotated[int, Query(ge=1, le=200)]
Where = Annotated[Sequence[Annotated[str, Query(max_length=1000)]], Query(max_length=20)]


@router.post("/api/complete")
async def complete(server: Served, request: Request, body: Complete) -> Json:
    return await server.work(request, server.asking.complete, body.prompt, body.completion, body.max_new_tokens)


@router.post("/api/ask")
async def ask(server: Served, request: Request, body: Question) -> Json:
    def asked() -> Any:
        return server.document(server.warm.ask(body), body.top, body.where)

    return await server.work(request, asked)


@router.get("/api/asked")
async def asked(server: Served) -> Json:
    return Json({"asked": server.state.asked()})


@router.get("/api/ask/{key}")
async def again(server: Served, request: Request, key: str, top: First = 20, where: Where = ()) -> Json:
    return await server.work(request, lambda: server.document(server.asked(key), top, list(where)))


@router.delete("/api/ask/{key}")
async def forget(server: Served, key: str) -> Json:
    server.state.forget(key)
    return Json({"forgotten": key})


@router.put("/api/ask/{key}/pin")
async def pin(server: Served, key: str, body: Pin) -> Json:
    entry = server.state.pin(key, body)
    if entry is None:
        raise NotThere(f"Nobody asked {key!r} here.")
    return Json(entry)


@router.get("/api/ask/{key}/rows")
async def rows(
    server: Served,
    request: Request,
    key: str,
    side: Literal["raises", "lowers"] = "raises",
    offset: Offset = 0,
    limit: Limit = 20,
    where: Where = (),
) -> Json:
    def more() -> Any:
        return server.asking.more(server.asked(key), side, offset, limit, server.decided(), list(where))

    return await server.work(request, more)


@router.get("/api/scores")
async def scores(server: Served) -> Json:
    from whence.serve.neighbours import saved

    return Json({"scores": await run_in_threadpool(saved, server.run.kept_scores())})


@router.get("/api/scores/{name}/{number}")
async def score(server: Served, request: Request, name: str, number: int, top: First = 20, where: Where = ()) -> Json:
    return await server.work(request, lambda: server.document(server.asked(f"scores:{name}:{number}"), top, list(where)))


@router.post("/api/pair")
async def pair(server: Served, request: Request, body: Pair) -> Json:
    return await server.work(request, lambda: server.asking.pair(server.asked(body.key), body.row))


@router.post("/api/map")
async def layers(server: Served, request: Request, body: Map) -> Json:
    return await server.work(request, lambda: server.asking.map(server.asked(body.key), body.rows))


@router.post("/api/cell")
async def cell(server: Served, request: Request, body: Cell) -> Json:
    return await server.work(request, lambda: server.asking.by_cell(server.asked(body.key), body, server.decided()))


@router.post("/api/whatif")
async def what_if(server: Served, request: Request, body: WhatIf) -> Json:
    return await server.work(request, lambda: server.asking.what_if(server.asked(body.key), body))


@router.post("/api/compare")
async def compare(server: Served, request: Request, body: Compare) -> Json:
    def compared() -> Any:
        from whence.serve.compared import side_by_side  # with torch

        a, b = server.asked(body.a), server.asked(body.b)
        found = side_by_side(server.asking, a, b, body.top)
        return found | {"copy": server.commands.comparison(a, b, body.top, found["rows_in_common"] > 0)}

    return await server.work(request, compared)


@router.post("/api/demo")
async def demo(server: Served, request: Request, body: Demo) -> Json:
    question = Question(prompt=body.prompt, completion=body.completion, top=body.top)
    return await server.work(request, lambda: server.asking.demo(server.warm.ask(question), body.top))


@router.post("/api/export")
async def export(server: Served, request: Request, body: Export) -> Response:
    from whence.serve.export import page

    def made() -> bytes:
        documents = [server.asking.document(server.asked(key), 20, server.decided()) for key in body.keys]
        pairs = {f"{each.key} {each.row}": server.asking.pair(server.asked(each.key), each.row) for each in body.pairs}
        pinned = [entry for entry in server.state.asked() if entry["key"] in body.keys and entry["pinned"]]
        facts = server.warm.facts() | ({"title": body.title} if body.title else {})
        return page(facts, documents, pairs, pinned, body.redact)

    return download(await server.made(request, made), "whence.html", "text/html; charset=utf-8")
