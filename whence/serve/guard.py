"""Who may ask the server: pages that it served itself, on this machine, with the token that the terminal printed.

Any page of the web can send requests to 127.0.0.1 from the user's browser, and a name of its own that resolves there makes it
the same origin (DNS rebinding). So the host that was asked for, the origin that asks and a secret are all checked, and the
answers say what a page may load: itself.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from whence.store.plain import encoded

STATIC = Path(__file__).parent / "static"

UNBUILT = "This checkout has no page yet: make page builds it, then start the server again. Programs are answered without it."
"""Said where the page would be."""
"""The page."""

BODY_BYTES = 2**20
"""Of a request, at most."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

LOCAL = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Passes on to `app` what may pass. `hosts` are names that the server may be called by besides those of this machine."""

    def __init__(self, app: Any, token: str, hosts: Collection[str] = LOCAL, *, wide: bool = False):
        self.app, self.token, self.hosts, self.wide = app, token.encode(), {*LOCAL, *hosts}, wide

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours opens a web socket
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        api = scope["path"].startswith("/api/")

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = dict(HEADERS) | ({"cache-control": "no-store"} if api else {})
                kept = [(name, value) for name, value in message["headers"] if name.decode().lower() not in own]
                message["headers"] = [*kept, *((name.encode(), value.encode()) for name, value in own.items())]
            await send(message)

        if refused := self._refusal(headers, api):
            await _refuse(answer, *refused)
            return
        body = b""
        while True:  # in full, before any work on it
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > BODY_BYTES:
                await _refuse(answer, 413, "The request is too large.", f"more than {BODY_BYTES:,} bytes")
                return
            if not message.get("more_body"):
                break
        waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, answer)

    def _refusal(self, headers: dict[str, str], api: bool) -> tuple[int, str, str] | None:
        """Status, sentence and what was given, of a request that may not pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._known(host):
            return 403, "This server is not called that.", f"Host: {host}"
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "Another site's page asks.", f"Origin: {origin}"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "Another site's page asks.", f"Sec-Fetch-Site: {headers['sec-fetch-site']}"
        if int(length if (length := headers.get("content-length", "0")).isdigit() else 0) > BODY_BYTES:
            return 413, "The request is too large.", f"{headers['content-length']} bytes"
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api and not hmac.compare_digest(given, self.token):
            return 401, "The token is missing or wrong.", ""
        return None

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.wide  # an address is not a name that others could give this machine


async def _refuse(send: Any, status: int, what: str, given: str = "") -> None:
    fix = "open the address that whence serve printed, with all that follows #" if status in (401, 403) else ""
    body = encoded({"error": {"what": what, "given": given, "accepted": "", "fix": fix, "code": None}})
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
