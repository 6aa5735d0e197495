"""A local fake of a language model's upstream: OpenAI-style and legacy routes, and switches for faults."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "llm-secret-key"


@dataclass
class Seen:
    """A request that arrived."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    query: dict[str, list[str]]
    body: Any


class FakeLlm:
    """Start with `with FakeLlm() as fake:`. `fake.url` is its base; the same process answers on a second
    address, `fake.elsewhere`. `fault`: a status, or redirect, redirect-away, loop, huge, endless, hang, html, no-choices."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.fault: int | str | None = None
        self.said: bytes | None = None
        self.legacy: tuple[str, bytes] = ("application/json", b'"a vivid red apple"')
        self.finish_reason = "stop"
        self.release = threading.Event()
        self._servers = [ThreadingHTTPServer((host, 0), self._handler()) for host in ("127.0.0.1", "127.0.0.2")]
        self.url, self.elsewhere = (f"http://{s.server_address[0]}:{s.server_address[1]}/v1" for s in self._servers)

    def __enter__(self) -> FakeLlm:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._serve(b"")

            def do_POST(self) -> None:
                self._serve(self.rfile.read(int(self.headers["content-length"])))

            def _serve(self, body: bytes) -> None:
                parts = urlsplit(self.path)
                headers = {k.lower(): v for k, v in self.headers.items()}
                fake.seen.append(Seen(str(self.server.server_address[0]), self.command, parts.path, headers, parse_qs(parts.query), json.loads(body) if body else None))
                fault = fake.fault
                if isinstance(fault, int):
                    return self._answer(fault, "application/json", fake.said or b"{}", {"Retry-After": "7"} if fault == 429 else {})
                if fault == "hang":
                    fake.release.wait(30)
                    return None
                if fault == "endless":
                    return self._drip()
                if fault == "redirect-away":
                    return self._answer(307, "text/plain", b"", {"Location": f"{fake.elsewhere}/chat/completions"})
                if fault == "loop" or (fault == "redirect" and not parts.path.endswith("/moved")):
                    return self._answer(307, "text/plain", b"", {"Location": f"{parts.path}/moved" if fault == "redirect" else self.path})
                if fault == "huge":
                    return self._answer(200, "application/json", b"x" * 200_000, {})
                if fault == "html":
                    return self._answer(200, "text/html", b"<p>log in</p>", {})
                if self.command == "GET":
                    return self._answer(200, *fake.legacy, {})
                question = json.loads(body)["messages"][-1]["content"]
                choice = {"index": 0, "message": {"role": "assistant", "content": f" answered: {question}\n"}, "finish_reason": fake.finish_reason}
                choices = [] if fault == "no-choices" else [choice]
                return self._answer(200, "application/json", json.dumps({"object": "chat.completion", "model": "tiny-1", "choices": choices}).encode(), {})

            def _answer(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def _drip(self) -> None:
                """A byte now and then: no read times out, the whole never comes to an end."""
                self.send_response(200)
                self.end_headers()
                try:
                    while not fake.release.is_set():
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.1)
                except OSError:
                    pass

        return Handler
