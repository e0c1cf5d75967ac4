"""Of the curvature's factors."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from whence.serve.answers import Json
from whence.serve.server import Served, Server

router = APIRouter()

Damping = Annotated[float, Query(ge=0, le=1e9)]


@router.get("/api/factors")
async def factors(server: Served, request: Request, damping: Damping = 0.1) -> Json:
    from whence.serve.factors import overview

    return await server.work(request, lambda: overview(server.curvature, damping) | _copy(server, damping))


@router.get("/api/factors/module")
async def module(server: Served, request: Request, name: str, damping: Damping = 0.1) -> Json:
    from whence.serve.factors import module

    return await server.work(request, lambda: module(server.curvature, name, damping) | _copy(server, damping, name))


def _copy(server: Server, damping: float, module: str = "") -> dict[str, Any]:
    """How to get the same elsewhere."""
    home = server.warm.home("factors")
    return {"copy": None if home is None else server.commands.factors(home, damping, module)}
