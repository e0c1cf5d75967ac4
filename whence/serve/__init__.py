"""A local page that stays open on a run: ask, see the rows behind an answer, look at factors and rows, start jobs.

The server listens on this machine only, asks nobody else for anything, and answers whoever has the token that it prints.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from urllib.parse import quote

from whence.errors import UsageError
from whence.escapes import command
from whence.serve.guard import LOCAL, STATIC, UNBUILT, Guard
from whence.serve.opening import Opening

__all__ = ["Opening", "serve"]

PORT, PORTS = 7788, 20
"""The first that is tried, and how many."""


def serve(
    opening: Opening,
    port: int = PORT,
    host: str = "127.0.0.1",
    *,
    at: str = "",
    said: Callable[[str], None] = lambda line: None,
    opened: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve a run until Ctrl-C. `said` gets the lines for people, `opened` the address, once it can be asked.

    `at` is what the page shows first, such as the question of saved scores ("trace/scores:NAME:0").

    Raises UsageError where neither the port nor those after it are free.
    """
    import uvicorn

    from whence.serve.app import application

    listening = bound(host, port)
    port, token = listening.getsockname()[1], secrets.token_urlsafe(32)
    wide = host not in LOCAL
    guarded = Guard(
        application(opening, said), token, [host, socket.gethostname(), socket.getfqdn()] if wide else (), wide=wide
    )
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/#t={token}{'/' if at else ''}{quote(at)}"
    said(f"{opening.out or opening.model}: {address}")
    if "SSH_CONNECTION" in os.environ and not wide:
        there = os.environ["SSH_CONNECTION"].split()[2]
        said(f"from your own machine: {command('ssh', '-L', f'{port}:127.0.0.1:{port}', there)}, then open the address there")
    if not STATIC.is_dir():
        said(UNBUILT)
    said("Ctrl-C stops the server; jobs continue, and are found again.")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            opened(address)

    settings = uvicorn.Config(
        guarded, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, lifespan="on"
    )
    Server(settings).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket on the port, or on the next that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for each in range(port, min(port + PORTS, 65536)) if port else [0]:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, each))
            found.listen(1024)
            return found
        except OSError as error:
            found.close()
            if isinstance(error, socket.gaierror) or error.errno not in (98, 48, 13):  # in use, or not for us
                raise UsageError(
                    f"{host} is not an address of this machine.", given=str(error), accepted="127.0.0.1"
                ) from error
    raise UsageError(f"No port from {port} to {port + PORTS - 1} is free.", fix="--port 0 takes any")
