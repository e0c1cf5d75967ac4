"""How the server answers: with JSON, a file, or a refusal that says what was wrong and what helps."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from whence.errors import StaleArtifact, UsageError, WhenceError
from whence.serve.lacking import Lacking, NotThere
from whence.serve.warm import Busy
from whence.shortage import shortage
from whence.store.plain import encoded

STATUS: tuple[tuple[type[WhenceError], int], ...] = (
    (NotThere, 404),
    (Busy, 503),
    (StaleArtifact, 409),
    (UsageError, 400),
    (WhenceError, 500),
)


class Json(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encoded(content)


def download(content: bytes, name: str, kind: str) -> Response:
    """A file to keep."""
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)


def refuse(app: FastAPI) -> None:
    """Answer errors with `{"error": {what, given, accepted, fix, code}}`."""

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
        return refusal(500, f"{type(error).__name__}: {error}", fix="see the lines above this in the terminal")


def refusal(status: int, what: str, **more: Any) -> Json:
    """An error as JSON."""
    headers = {"retry-after": "1"} if status == 503 else None
    said = {"what": what, "given": "", "accepted": "", "fix": "", "code": None} | more
    return Json({"error": said}, status_code=status, headers=headers)
