"""The routes: what a page can ask, and how it is answered. `docs/serve.md` describes them; nothing here computes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.serve.guard import STATIC
from whence.serve.jobs import OVER, Jobs
from whence.serve.lacking import Lacking, NotThere
from whence.serve.opening import Opening
from whence.serve.plain import encoded
from whence.serve.requests import Cell, Compare, Complete, Decision, Demo, Export, Map, NewJob, Pair, Pin, Question, WhatIf
from whence.serve.warm import Busy, Warm
from whence.shortage import shortage
from whence.version import __version__

STATUS: tuple[tuple[type[WhenceError], int], ...] = (
    (NotThere, 404),
    (Busy, 503),
    (StaleArtifact, 409),
    (UsageError, 400),
    (WhenceError, 500),
)

Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=500)]
Damping = Annotated[float, Query(ge=0, le=1e9)]
Where = Annotated[Sequence[Annotated[str, Query(max_length=1000)]], Query(max_length=20)]
Decided = Literal["any", "yes", "no", "drop", "keep", "fix", "unsure"]


class Json(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encoded(content)


def application(opening: Opening, said: Callable[[str], None] = lambda line: None) -> FastAPI:
    """The server of one run, which is opened when it starts; `said` hears why that failed."""
    hearers: set[asyncio.Queue[ServerSentEvent]] = set()
    loops: list[asyncio.AbstractEventLoop] = []
    jobs: list[Jobs] = []

    def send(event: str, value: Any) -> None:
        """Tell all pages; one that does not listen misses the oldest."""
        for queue in hearers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(ServerSentEvent(event=event, raw_data=encoded(value).decode()))

    def tell(event: str, make: Callable[[], Any]) -> None:
        """Tell from whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loops[0].call_soon_threadsafe(lambda: send(event, make()))

    warm = Warm(opening, lambda: tell("run", warm.facts))

    def over(job: dict[str, Any]) -> None:
        if job["state"] == "done":
            warm.worker.submit(warm.refresh, job)

    async def background() -> None:
        await asyncio.wrap_future(warm.start())
        if warm.error:
            said("\n".join(filter(None, (warm.error.get(key) for key in ("what", "given", "accepted", "fix")))))
        if warm.state is None:
            return
        staged = warm.run is not None and warm.run.resolved is not None
        jobs.append(Jobs(opening, warm.state, staged, lambda job: tell("job", lambda: job), over))
        await jobs[0].watch()

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(background())
        yield
        task.cancel()
        warm.close()

    quiet = {
        "docs_url": None,
        "redoc_url": None,
        "telemetry": dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False),
    }
    app = FastAPI(title="whence", version=__version__, lifespan=life, openapi_url="/api/openapi.json", **quiet)
    app.state.warm = warm

    def ready(name: str) -> Any:
        """A part of the run that is loaded. Raises Busy while it is not."""
        if (part := getattr(warm, name)) is None:
            if warm.error:
                raise Lacking(**{key: warm.error.get(key) or "" for key in ("what", "given", "accepted", "fix")})
            raise Busy(f"The run is being opened ({warm.what}).", fix="ask again in a moment")
        return part

    def the_jobs() -> Jobs:
        ready("state")
        if not jobs:
            raise Busy("The run is being opened.", fix="ask again in a moment")
        return jobs[0]

    def current() -> dict[str, Any]:
        return warm.decisions.current() if warm.decisions is not None else {}

    async def work(request: Request, function: Callable[..., Any], *arguments: Any) -> Json:
        ready("asking")
        return Json(await warm.work(function, *arguments, gone=request.is_disconnected))

    def found(key: str) -> Any:
        """A question by its key, in the worker's thread."""
        return warm.asking.known(key, warm.state.question)  # type: ignore[union-attr]

    def document(key: str, top: int, where: list[str]) -> Any:
        return warm.asking.document(found(key), top, current(), where)  # type: ignore[union-attr]

    # errors

    def refusal(status: int, what: str, **more: Any) -> Json:
        headers = {"retry-after": "1"} if status == 503 else None
        said = {"what": what, "given": "", "accepted": "", "fix": "", "code": None} | more
        return Json({"error": said}, status_code=status, headers=headers)

    @app.exception_handler(WhenceError)
    async def mistake(request: Request, error: WhenceError) -> Json:
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        job = {"job": error.job} if isinstance(error, Lacking) and error.job else {}
        said = {name: getattr(error, name) for name in ("given", "accepted", "fix", "code")}
        return refusal(status, error.what, **said, **job)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Json:
        first = error.errors()[0]
        return refusal(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Json:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Json:
        if (known := shortage(error)) is not None:
            return await mistake(request, known)
        return refusal(500, f"{type(error).__name__}: {error}", fix="what is above this in the terminal says where")

    # the run

    @app.get("/api/run")
    async def run() -> Json:
        return Json(await run_in_threadpool(warm.facts))

    @app.get("/api/runs")
    async def runs() -> Json:
        from whence.serve.neighbours import neighbours

        return Json({"runs": await run_in_threadpool(neighbours, ready("run").out)})

    @app.get("/api/events", response_class=EventSourceResponse)
    async def events() -> AsyncIterator[ServerSentEvent]:
        queue: asyncio.Queue[ServerSentEvent] = asyncio.Queue(100)
        hearers.add(queue)
        try:
            yield ServerSentEvent(event="run", raw_data=encoded(await run_in_threadpool(warm.facts)).decode())
            for job in jobs[0].documents() if jobs else ():
                if job["state"] not in OVER:
                    yield ServerSentEvent(event="job", raw_data=encoded(job).decode())
            while True:
                yield await queue.get()
        finally:
            hearers.discard(queue)

    # questions

    @app.post("/api/complete")
    async def complete(request: Request, body: Complete) -> Json:
        return await work(request, ready("asking").complete, body.prompt, body.completion, body.max_new_tokens)

    @app.post("/api/ask")
    async def ask(request: Request, body: Question) -> Json:
        return await work(request, lambda: warm.asking.document(warm.ask(body), body.top, current(), body.where))  # type: ignore[union-attr]

    @app.get("/api/asked")
    async def asked() -> Json:
        return Json({"asked": ready("state").asked()})

    @app.get("/api/ask/{key}")
    async def again(request: Request, key: str, top: Annotated[int, Query(ge=1, le=200)] = 20, where: Where = ()) -> Json:
        return await work(request, document, key, top, list(where))

    @app.delete("/api/ask/{key}")
    async def forget(key: str) -> Json:
        ready("state").forget(key)
        return Json({"forgotten": key})

    @app.put("/api/ask/{key}/pin")
    async def pin(key: str, body: Pin) -> Json:
        entry = ready("state").pin(key, body)
        if entry is None:
            raise NotThere(f"Nobody asked {key!r} here.")
        return Json(entry)

    @app.get("/api/ask/{key}/rows")
    async def rows(
        request: Request,
        key: str,
        side: Literal["raises", "lowers"] = "raises",
        offset: Offset = 0,
        limit: Limit = 20,
        where: Where = (),
    ) -> Json:
        return await work(request, lambda: ready("asking").more(found(key), side, offset, limit, current(), list(where)))

    @app.get("/api/scores")
    async def scores() -> Json:
        from whence.serve.neighbours import saved

        return Json({"scores": await run_in_threadpool(saved, ready("run").kept_scores())})

    @app.get("/api/scores/{name}/{number}")
    async def score(
        request: Request, name: str, number: int, top: Annotated[int, Query(ge=1, le=200)] = 20, where: Where = ()
    ) -> Json:
        return await work(request, document, f"scores:{name}:{number}", top, list(where))

    @app.post("/api/pair")
    async def pair(request: Request, body: Pair) -> Json:
        return await work(request, lambda: ready("asking").pair(found(body.key), body.row))

    @app.post("/api/map")
    async def layers(request: Request, body: Map) -> Json:
        return await work(request, lambda: ready("asking").map(found(body.key), body.rows))

    @app.post("/api/cell")
    async def cell(request: Request, body: Cell) -> Json:
        return await work(request, lambda: ready("asking").by_cell(found(body.key), body, current()))

    @app.post("/api/whatif")
    async def what_if(request: Request, body: WhatIf) -> Json:
        return await work(request, lambda: ready("asking").what_if(found(body.key), body))

    @app.post("/api/compare")
    async def compare(request: Request, body: Compare) -> Json:
        return await work(request, lambda: ready("asking").compare(found(body.a), found(body.b), body.top))

    @app.post("/api/demo")
    async def demo(request: Request, body: Demo) -> Json:
        question = Question(prompt=body.prompt, completion=body.completion, top=body.top)
        return await work(request, lambda: ready("asking").demo(warm.ask(question), body.top))

    @app.post("/api/export")
    async def export(request: Request, body: Export) -> Response:
        from whence.serve.export import page

        def made() -> bytes:
            documents = [warm.asking.document(found(key), 20, current()) for key in body.keys]  # type: ignore[union-attr]
            pairs = {f"{each.key} {each.row}": warm.asking.pair(found(each.key), each.row) for each in body.pairs}  # type: ignore[union-attr]
            pinned = [entry for entry in warm.state.asked() if entry["key"] in body.keys and entry["pinned"]]  # type: ignore[union-attr]
            facts = warm.facts() | ({"title": body.title} if body.title else {})
            return page(facts, documents, pairs, pinned, body.redact)

        ready("asking")
        content = await warm.work(made, gone=request.is_disconnected)
        return _download(content, "whence.html", "text/html; charset=utf-8")

    # factors

    @app.get("/api/factors")
    async def factors(request: Request, damping: Damping = 0.1) -> Json:
        from whence.serve.factors import overview

        return await work(request, lambda: overview(curvature(), damping))

    @app.get("/api/factors/module")
    async def module(request: Request, name: str, damping: Damping = 0.1) -> Json:
        from whence.serve.factors import module

        return await work(request, lambda: module(curvature(), name, damping))

    def curvature() -> Any:
        if "curvature" not in vars(warm.run):
            raise Lacking("There are no factors yet.", job="fit", fix="start the job here")
        return warm.run.curvature  # type: ignore[union-attr]

    # rows and decisions

    @app.get("/api/data")
    async def data(
        offset: Offset = 0,
        limit: Limit = 50,
        sort: Literal["row", "self", "length"] = "row",
        search: Annotated[str, Query(max_length=1000)] = "",
        source: str | None = None,
        decided: Decided = "any",
    ) -> Json:
        return Json(await run_in_threadpool(ready("browser").page, offset, limit, sort, search, source, decided))

    @app.get("/api/data/row")
    async def row(request: Request, id: str) -> Json:
        ready("browser")
        return await work(request, lambda: warm.browser.row(id))  # type: ignore[union-attr]

    @app.get("/api/data/neighbours")
    async def near(request: Request, id: str, top: Annotated[int, Query(ge=1, le=50)] = 5) -> Json:
        def sides() -> Any:
            query = warm.asking.document(warm.asking.ask(Question(row=id, top=top)), top, current())["query"]  # type: ignore[union-attr]
            return {"helps": query["raises"], "hurts": query["lowers"]}

        return await work(request, sides)

    @app.get("/api/review")
    async def review(offset: Offset = 0, limit: Limit = 20, decided: Decided = "no") -> Json:
        return Json(await run_in_threadpool(ready("browser").review, offset, limit, decided))

    @app.get("/api/decisions")
    async def decisions() -> Json:
        kept = ready("decisions")
        return Json({"decisions": kept.current(), "events": len(kept.events), "progress": ready("browser").progress()})

    @app.post("/api/decisions")
    async def decide(body: Decision) -> Json:
        ready("asking").number(body.id)
        made = await run_in_threadpool(ready("decisions").decide, body.id, body.verdict, body.why, body.who)
        return Json({"decision": made, "progress": ready("browser").progress()})

    @app.post("/api/decisions/undo")
    async def undo() -> Json:
        undone = await run_in_threadpool(ready("decisions").undo)
        return Json({"undone": undone, "progress": ready("browser").progress()})

    @app.get("/api/decisions/droplist")
    async def drop_list(form: Literal["txt", "jsonl", "kept"] = "txt") -> Response:
        content = await run_in_threadpool(ready("browser").drop_list, form)
        name = "kept.jsonl" if form == "kept" else f"drop.{form}"
        return _download(content, name, "text/plain; charset=utf-8" if form == "txt" else "application/jsonl")

    # jobs

    @app.get("/api/jobs")
    async def all_jobs() -> Json:
        return Json({"jobs": the_jobs().documents()})

    @app.post("/api/jobs")
    async def new_job(body: NewJob) -> Json:
        return Json(the_jobs().create(body), status_code=201)

    @app.get("/api/jobs/{number}")
    async def job(number: int) -> Json:
        return Json(the_jobs().document(number))

    @app.post("/api/jobs/{number}/cancel")
    async def cancel(number: int) -> Json:
        return Json(await run_in_threadpool(the_jobs().cancel, number))

    @app.post("/api/jobs/{number}/resume")
    async def resume(number: int) -> Json:
        return Json(the_jobs().resume(number))

    @app.get("/api/jobs/{number}/log")
    async def log(number: int, tail: Annotated[int, Query(ge=1, le=10_000)] = 200) -> Json:
        return Json({"lines": the_jobs().log(number, tail)})

    if STATIC.is_dir():
        app.mount("/", StaticFiles(directory=STATIC, html=True), name="page")
    return app


def _download(content: bytes, name: str, kind: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)
