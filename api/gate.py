"""The door of every public listener: keys, health, body limits, and one shape for errors.

Plain ASGI middleware on each BentoML service. Deny by default: every path needs a key, but for an
exact-match list. Behind a dependency's private socket it lets everything pass; the entry's own
gate has already asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from typing import Any, get_args

from bentoml._internal.context import server_context
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import backend, errors, links, studio
from core import logs, metrics, problems
from core.auth import Caller, Keys
from core.draining import Draining
from core.placement import addresses
from core.plans import Task
from core.problems import Problem, problem
from core.quotas import Quotas
from core.settings import Settings
from core.status import RunnerStatus

log = logging.getLogger("easel.api")
ADMIN_PREFIX = "/admin/"
ADMIN_PATHS = {"/add_new_lora", "/add_lora", "/remove_lora"}  # as the seed and BentoML's client name them
A1111_PREFIX = "/sdapi/"  # whose clients send HTTP Basic: the password is the key
UPLOAD_PATH = "/admin/loras/upload"
FORM_BYTES = 1024 * 1024  # what a form may have beside its file
# Public path to the contracts' own: typed calls, which BentoML would parse unsafely, and BentoML's
# document, which knows less than ours.
TYPED = ("/txt2img", "/img2img", "/inpaint", "/outpaint", "/upscale", "/animate", "/add_lora", "/remove_lora", "/list_loras", *(f"/{task}" for task in get_args(Task)))
DIRECT = {**{path: path for path in TYPED}, "/docs.json": "/openapi.json"}
_PROBED = ("/livez", "/healthz", "/readyz", "/metrics")
_HEALTH = ("/livez", "/healthz", "/readyz")
_OWN = (*_HEALTH, "/docs", "/openapi.json")
_INTERNAL = "/internal"  # what an entry calls of its workers
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Gate:
    """ASGI middleware.

    Args:
        app: BentoML's application.
        http: the contracts' application, which answers the `DIRECT` paths before BentoML parses them.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keys, quotas: Quotas, http: FastAPI, draining: Draining) -> None:
        self.app, self.http, self.settings, self.keys, self.quotas, self.draining = app, http, settings, keys, quotas, draining
        self._met: set[str] = set()
        # Those come and go with their own replicas; one that works is enough.
        self._elsewhere = addresses(settings).keys()
        self.public = {"/metrics"} if settings.auth.public_metrics else set()
        self.public |= studio.paths()
        if settings.auth.public_docs:
            self.public |= {"/docs", "/openapi.json", "/docs.json", "/docs/oauth2-redirect"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or server_context.service_type != "entry_service":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: nothing here is one
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = _asked_for(scope) or uuid.uuid4().hex
        logs.begin(request_id)
        answer = _Answer(send, request_id, scope["path"])
        began = time.perf_counter()
        try:
            await self._serve(scope, receive, answer)
        except Problem as error:
            await answer.problem(error)
        except Exception:
            log.exception("the request failed")
            await answer.problem(problem(500, "internal", "Internal error", f"The server failed; its log has request {request_id}."))
        finally:
            self._tell(scope, answer.status, time.perf_counter() - began)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer, and log it: without its query, which may be a prompt."""
        route, service = self._route(scope["path"]), metrics.here()
        method = scope["method"] if scope["method"] in _METHODS else metrics.OTHER
        metrics.REQUESTS.labels(service, route, method, status).inc()
        metrics.REQUEST_SECONDS.labels(service, route).observe(seconds)
        if scope["path"] not in _PROBED and not scope["path"].startswith(_INTERNAL):
            caller = scope.get("state", {}).get("caller")
            more = {"path": scope["path"][:200]} if route == metrics.OTHER else {}
            told = {"method": method, "route": route, "status": status, "duration_ms": round(1000 * seconds, 1), "key": caller.id if caller else None, **more, **logs.noted()}
            log.info("answered", extra=told)

    def _route(self, path: str) -> str:
        """A path as the OpenAPI document has it, or "other": what callers make up is no label."""
        if path in _OWN or path in DIRECT:
            return path
        if path.startswith(_INTERNAL):
            return _INTERNAL
        return next((r.path_format for r in self.http.state.routes if r.path_regex.match(path)), metrics.OTHER)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        path: str = scope["path"]
        if path in _HEALTH and scope["method"] not in ("GET", "HEAD"):
            raise _standard(405, {"allow": "GET, HEAD"})
        if path in ("/livez", "/healthz"):
            await answer.json(200, {"status": "alive"})
            return
        if path == "/readyz":
            await self._ready(answer)
            return
        if path.startswith(_INTERNAL) and self.keys.entry(_headers(scope)):
            if _headers(scope).get("content-type", "").partition(";")[0] != "application/json":  # BentoML would read pickles
                raise problem(415, "unsupported-media-type", "Unsupported media type", "An entry sends application/json.")
            await self.app(scope, receive, answer)
            await answer.finish()
            return
        if path not in self.public and not links.opens(path):
            scope.setdefault("state", {})["caller"] = caller = self._admit(scope)
            if scope["method"] == "POST":
                answer.extra = await self.quotas.request(caller)
        if path.startswith(_INTERNAL):
            raise problem(404, "not-found", "Not found", f"There is no {path[:200]}.")
        if self.draining.active and (scope["method"] == "POST" or path in ADMIN_PATHS):
            raise self.draining.refuse()
        app = self.app
        if path in DIRECT:
            scope = {**scope, "path": DIRECT[path], "raw_path": DIRECT[path].encode()}
            app = self.http
        with self.draining.answering():
            await app(scope, self._bounded(scope, receive), answer)
        await answer.finish()

    async def _ready(self, answer: _Answer) -> None:
        """Ready: every runner has been ready once, and one is now. A runner that is lost later on does
        not keep requests from the other; its own routes answer 503 until it is back."""
        if self.draining.active:
            raise self.draining.refuse()
        states = {name: _state(status) for name, status in (await backend.statuses()).items()}
        self._met |= {name for name, state in states.items() if state == "ready"}
        new = {name: state for name, state in states.items() if name not in self._met | self._elsewhere}
        if "warming up" in new.values():
            raise problems.unavailable("Models are being warmed up.", retry_after=5, slug="warming-up")
        if new or "ready" not in states.values():
            lost = ", ".join(f"{name} ({state})" for name, state in states.items() if state != "ready")
            raise problems.unavailable(f"Not ready: {lost}.", retry_after=5, slug="runner-gone")
        await answer.json(200, {"status": "ready", "runners": states})

    def _admit(self, scope: Scope) -> Caller:
        """Who calls.

        Raises:
            Problem: 401 without a valid key, 403 for a user key on an admin path. Without keys, 403 for
                who is not on this machine, and for pages of other sites in a browser that is. A browser sends
                the Basic key by itself, other sites' pages included; for those it is none.
        """
        headers = _headers(scope)
        if self.keys.off and not _is_local(scope):
            raise problem(403, "auth-off", "Forbidden", "auth.mode is off, which serves loopback addresses only. Configure keys to serve others.")
        if self.keys.off and (_cross_site(headers) or not _names_loopback(headers.get("host", ""))):
            raise problem(403, "cross-site", "Forbidden", "auth.mode is off, so pages of other sites are refused. Configure keys to serve them.")
        a1111 = scope["path"].startswith(A1111_PREFIX)
        caller = self.keys.caller(headers, basic=a1111 and not _cross_site(headers))
        if caller is None:
            raise problem(
                401, "unauthorized", "Unauthorized",
                "A valid key is needed: X-API-Key: KEY, or Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": 'Bearer realm="easel", ApiKey realm="easel"' + (', Basic realm="easel"' if a1111 else "")},
            )
        if _for_admins(scope["path"]) and caller.role != "admin":
            raise problem(403, "forbidden", "Forbidden", "This needs an admin key.")
        return caller

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, counting the body's bytes, and how long they take. An uploaded LoRA has a limit of its own: it goes to the disk."""
        limit = self.settings.limits.body_bytes
        if scope["path"] == UPLOAD_PATH:
            limit = self.settings.loras.max_bytes + FORM_BYTES
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and (not value.isdigit() or int(value) > limit):
                raise problems.too_large(limit)
        server, seen, waited, whole = self.settings.server, 0, 0.0, False

        async def counted() -> Message:
            nonlocal seen, waited, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(server.patience_s + seen / server.least_rate - waited):
                    message = await receive()
            except TimeoutError:
                raise problems.too_slow(server.least_rate) from None
            waited += time.monotonic() - began  # not what the server takes in between
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit:
                raise problems.too_large(limit)
            return message

        return counted


class _Answer:
    """`send`, turning every error that has not yet the shape of its path into one that has, and adding the request's id."""

    def __init__(self, send: Send, request_id: str, path: str) -> None:
        self._send, self._id, self._path = send, request_id, path
        self._started = False
        self.status = 499  # unless one is sent: the client was gone
        self._error: tuple[int, dict[str, str]] | None = None
        self.extra: dict[str, str] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in message["headers"]}
            if message["status"] >= 400 and not headers.get("content-type", "").startswith(errors.media_type(self._path)):
                self._error = (message["status"], {k: v for k, v in headers.items() if k in ("allow", "retry-after", "www-authenticate")})
                return
            self._started, self.status = True, message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._id.encode()), (b"x-content-type-options", b"nosniff"), *((k.lower().encode(), v.encode()) for k, v in self.extra.items())]}
        elif self._error is not None:
            return
        await self._send(message)

    async def finish(self) -> None:
        """Send the problem for an error answer that was held back."""
        if self._error is not None:
            (status, headers), self._error = self._error, None
            await self.problem(_standard(status, headers))

    async def problem(self, error: Problem) -> None:
        if self._started:  # too late for a status; the connection ends without its last chunk
            return
        self._error = None
        metrics.problem(error)
        extra = [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in error.headers.items()]
        await self._whole(errors.status(self._path, error), errors.media_type(self._path), errors.body(self._path, error), extra)

    async def json(self, status: int, content: dict[str, Any]) -> None:
        await self._whole(status, "application/json", json.dumps(content).encode(), [])

    async def _whole(self, status: int, media_type: str, body: bytes, extra: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode()), *extra]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


_TITLES = {400: "Bad request", 404: "Not found", 405: "Method not allowed", 415: "Unsupported media type", 503: "Service unavailable", 504: "Timed out"}


def _standard(status: int, headers: dict[str, str]) -> Problem:
    title = _TITLES.get(status, "Request failed" if status < 500 else "Internal error")
    detail = {404: "There is nothing at this path.", 405: f"Allowed: {headers.get('allow', 'other methods')}."}.get(status, f"{title}.")
    return problem(status, title.lower().replace(" ", "-"), title, detail, headers=headers)


def _state(status: RunnerStatus | Problem) -> str:
    if isinstance(status, Problem):
        return "down"
    if status.draining:
        return "shutting down"
    return "ready" if status.ready else "warming up"


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("utf-8", "surrogateescape") for name, value in scope["headers"]}


def _asked_for(scope: Scope) -> str | None:
    """The id that a proxy, or the caller, has given the request, where it is fit for a log."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else None


def _for_admins(path: str) -> bool:
    return path.startswith(ADMIN_PREFIX) or path in ADMIN_PATHS


def _cross_site(headers: dict[str, str]) -> bool:
    """Whether a page of another site sent the request. Browsers say so of addresses they trust (https, loopback); of others Origin tells."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("none", "same-origin")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _names_loopback(host: str) -> bool:
    """Whether a Host header names this machine. A page of a site whose name was made to lead here (DNS rebinding) counts
    as same-origin, and shows itself by that name alone."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_local(scope: Scope) -> bool:
    """Whether the connection came in on a loopback address, by the socket's own end."""
    server = scope.get("server") or ("", 0)
    try:
        return ipaddress.ip_address(server[0]).is_loopback
    except ValueError:
        return False
