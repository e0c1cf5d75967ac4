"""The server as an application: its routes by subject, its refusals, and the page. `docs/serve.md` describes the routes."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles

from whence.serve.answers import refuse
from whence.serve.guard import STATIC, UNBUILT
from whence.serve.opening import Opening
from whence.serve.routes import data, factors, jobs, questions, run
from whence.serve.server import Server
from whence.version import __version__


def application(opening: Opening, said: Callable[[str], None] = lambda line: None) -> FastAPI:
    """The server of one run, which is opened when it starts; `said` hears why that failed."""
    server = Server(opening, said)
    quiet = {
        "docs_url": None,
        "redoc_url": None,
        "telemetry": dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False),
    }
    app = FastAPI(title="whence", version=__version__, lifespan=server.life, openapi_url="/api/openapi.json", **quiet)
    app.state.server = server
    refuse(app)
    for part in (run, questions, factors, data, jobs):
        app.include_router(part.router)
    if STATIC.is_dir():
        app.mount("/", StaticFiles(directory=STATIC, html=True), name="page")
    else:
        app.add_route("/", lambda request: PlainTextResponse(UNBUILT, 404))
    return app
