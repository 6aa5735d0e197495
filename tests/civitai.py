"""A local fake of Civitai: its API on 127.0.0.1 and its file host on 127.0.0.2, with switches for faults.
Beside it a hub of repositories on 127.0.0.3, whose files are on the same file host.

Shapes as in Civitai's REST API v1. Downloads redirect to a signed address on the file host, which
answers 400 to a request that has an Authorization header, as the real one does.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy
from safetensors.numpy import save

KEY = "civit-secret-key"
SIGNATURE = "signed-secret"


def weights(seed: int = 0, kilobytes: int = 300, key: str = "lora_unet_down_blocks_0.lora_down.weight") -> bytes:
    """A safetensors file that looks like a LoRA."""
    random = numpy.random.default_rng(seed)
    return save({key: random.standard_normal((kilobytes, 256)).astype("float32")})


@dataclass
class Faults:
    """What goes wrong, and for how many requests (of the host in question)."""

    api_status: int | None = None
    api_headers: dict[str, str] = field(default_factory=dict)
    api_body: bytes | None = None
    download_status: int | None = None
    download_body: dict[str, Any] = field(default_factory=dict)
    download_headers: dict[str, str] = field(default_factory=dict)
    redirect: str | None = None
    file: str | None = None  # html, json, cut, stall, hang, wrong, no-range, changed, expired, chunked, huge, slow
    times: int = 1_000_000

    def strikes(self) -> bool:
        self.times -= 1
        return self.times >= 0


@dataclass
class Seen:
    """A request that arrived."""

    host: str
    path: str
    headers: dict[str, str]


class FakeCivitai:
    """Start with `with FakeCivitai() as fake:`; `fake.url` is the API's address."""

    def __init__(self) -> None:
        self.models: dict[int, dict[str, Any]] = {}
        self.contents: dict[int, bytes] = {}
        self.repos: dict[str, dict[str, Any]] = {}
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.page = 100
        self._api = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, self._answer_api))
        self._files = ThreadingHTTPServer(("127.0.0.2", 0), _handler(self, self._answer_file))
        self._hub = ThreadingHTTPServer(("127.0.0.3", 0), _handler(self, self._answer_hub))
        self.hub_url = f"http://127.0.0.3:{self._hub.server_address[1]}"
        self.url = f"http://127.0.0.1:{self._api.server_address[1]}"
        self.files_url = f"http://127.0.0.2:{self._files.server_address[1]}"

    def __enter__(self) -> FakeCivitai:
        for server in (self._api, self._files, self._hub):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._api, self._files, self._hub):
            server.shutdown()
            server.server_close()

    def settings(self) -> dict[str, Any]:
        """What `loras` of the configuration needs for this fake."""
        return {
            "civitai_url": self.url, "hub_url": self.hub_url, "allowed_hosts": ["127.0.0.2"], "allowed_schemes": ["http"],
            "allow_private_hosts": ["127.0.0.1", "127.0.0.2", "127.0.0.3"], "retry_wait_s": 0.02, "max_wait_s": 2, "stall_timeout_s": 0.6,
            "connect_timeout_s": 2, "attempts": 3, "max_bytes": 4 * 1024 * 1024,
        }

    def add(self, model_id: int, name: str, *, version_id: int | None = None, content: bytes | None = None, base: str = "SDXL 1.0",
            file: dict[str, Any] | None = None, version: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
        """A model with one version (a second call with its id adds a newer one). Defaults: a good SDXL LoRA."""
        version_id = version_id or model_id * 10
        content = weights(version_id) if content is None else content
        self.contents[version_id] = content
        sha = hashlib.sha256(content).hexdigest().upper()
        made_file = {
            "id": version_id * 10, "name": "../../uploader's choice.safetensors", "type": "Model", "sizeKB": len(content) / 1024,
            "metadata": {"format": "SafeTensor", "size": None, "fp": None}, "pickleScanResult": "Success", "virusScanResult": "Success",
            "hashes": {"AutoV2": sha[:10], "SHA256": sha}, "downloadUrl": f"{self.url}/api/download/models/{version_id}", "primary": True,
        } | (file or {})
        made_version = {
            "id": version_id, "modelId": model_id, "name": f"v{version_id}", "baseModel": base, "status": "Published", "usageControl": "Download",
            "trainedWords": [f"{name} style", "extra, "], "stats": {"downloadCount": 5}, "files": [made_file],
            "images": [{"url": "https://image.civitai.com/p.jpeg", "type": "image"}], "downloadUrl": made_file["downloadUrl"],
        } | (version or {})
        made = self.models.setdefault(model_id, {
            "id": model_id, "name": name, "type": "LORA", "nsfw": False, "poi": False, "allowNoCredit": False, "allowCommercialUse": ["Image"],
            "allowDerivatives": True, "allowDifferentLicense": True, "creator": {"username": "ann", "image": None}, "tags": ["style"],
            "stats": {"downloadCount": model_id * 3}, "modelVersions": [],
        })
        made |= model
        made["modelVersions"].insert(0, made_version)
        return made

    def add_repo(self, repo_id: str, files: dict[str, bytes], **card: Any) -> None:
        """A repository of the hub."""
        self.repos[repo_id] = {"files": files, "card": card}

    def downloads(self) -> list[Seen]:
        return [s for s in self.seen if s.host == "127.0.0.2"]

    def _answer_api(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        parts, query, faults = url.path.strip("/").split("/"), parse_qs(url.query), self.faults
        if url.path.startswith("/api/download/models/"):
            self._answer_download(http, int(parts[3]))
        elif url.path == "/login":
            _send(http, 200, b"<html>log in</html>", {"Content-Type": "text/html"})
        elif faults.api_body is not None and faults.strikes():
            _send(http, 200, faults.api_body, {"Content-Type": "text/html"})
        elif faults.api_status and faults.strikes():
            _json(http, faults.api_status, {"error": "brown-out", "message": f"key {KEY}"}, faults.api_headers)
        elif url.path == "/api/v1/models":
            self._search(http, query)
        elif url.path.startswith("/api/v1/models/"):
            found = self.models.get(int(parts[3]))
            _json(http, *((200, found) if found else (404, {"error": f"No model with id {parts[3]}"})))
        elif url.path.startswith("/api/v1/model-versions/"):
            self._version(http, int(parts[3]))
        else:
            _json(http, 404, {"error": "Not Found"})

    def _answer_hub(self, http: BaseHTTPRequestHandler) -> None:
        path = urlsplit(http.path).path.strip("/")
        if path.startswith("api/models/"):
            self._repo(http, "/".join(path.split("/")[2:4]))
        else:
            _send(http, 302, b"", {"Location": f"{self.files_url}/hub/{path}"})

    def _search(self, http: BaseHTTPRequestHandler, query: dict[str, list[str]]) -> None:
        if "page" in query:
            _json(http, 400, {"error": "Cannot use page param with query search."})
            return
        words = query["query"][0].lower().split()
        hits = [m for m in self.models.values() if m["type"] in query["types"] and all(w in m["name"].lower() for w in words)]
        start = int(query.get("cursor", ["0"])[0])
        after = start + self.page if start + self.page < len(hits) else None
        _json(http, 200, {"items": hits[start : start + self.page], "metadata": {"nextCursor": after and str(after)}})

    def _version(self, http: BaseHTTPRequestHandler, number: int) -> None:
        for model in self.models.values():
            for version in model["modelVersions"]:
                if version["id"] == number:
                    inner = {k: model[k] for k in ("name", "type", "nsfw", "poi")}
                    _json(http, 200, {**version, "modelId": model["id"], "model": inner})
                    return
        _json(http, 404, {"error": "Model not found"})

    def _repo(self, http: BaseHTTPRequestHandler, repo_id: str) -> None:
        if repo_id not in self.repos:
            _json(http, 404, {"error": "Repository not found"})
            return
        repo = self.repos[repo_id]
        siblings = [{"rfilename": n, "size": len(c), "lfs": {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)}} for n, c in repo["files"].items()]
        _json(http, 200, {"id": repo_id, "author": repo_id.split("/")[0], "sha": "a" * 40, "siblings": siblings, "cardData": repo["card"]})

    def _answer_download(self, http: BaseHTTPRequestHandler, number: int) -> None:
        faults = self.faults
        if faults.download_status and faults.strikes():
            _json(http, faults.download_status, faults.download_body, faults.download_headers)
        elif "Mozilla" in http.headers.get("User-Agent", ""):
            _send(http, 307, b"", {"Location": f"{self.url}/login"})
        else:
            location = faults.redirect or f"{self.files_url}/files/{number}?X-Signature={SIGNATURE}"
            _send(http, 307, b"", {"Location": location, "Cache-Control": "no-store"})

    def _answer_file(self, http: BaseHTTPRequestHandler) -> None:
        if "Authorization" in http.headers:
            _send(http, 400, b"<Error>only one authentication mechanism</Error>", {"Content-Type": "application/xml"})
            return
        path = urlsplit(http.path).path
        if path.startswith("/hub/"):
            owner, repo, _, _, name = path.removeprefix("/hub/").split("/", 4)
            content = self.repos[f"{owner}/{repo}"]["files"][unquote(name)]
        else:
            content = self.contents[int(path.split("/")[-1])]
        faults = self.faults
        _send_file(http, content, faults.file if faults.file and faults.strikes() else None)


def _send_file(http: BaseHTTPRequestHandler, content: bytes, fault: str | None) -> None:
    if fault in ("html", "json"):
        _send(http, 200, b"<html>moved</html>", {"Content-Type": "text/html; charset=utf-8" if fault == "html" else "application/json"})
        return
    if fault == "expired":
        _send(http, 403, b"<Error>Request has expired</Error>", {"Content-Type": "application/xml"})
        return
    if fault == "wrong":
        content = content[:-4] + b"\0\0\0\1"
    etag = '"' + hashlib.sha256(content).hexdigest()[:8] + ('-2"' if fault == "changed" else '"')
    start, status, headers = 0, 200, {"Content-Type": "application/octet-stream", "ETag": etag}
    asked = http.headers.get("Range", "")
    if asked and http.headers.get("If-Range") == etag and fault != "no-range":
        start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    body = content[start:]
    if fault == "chunked":
        http.send_response(200)
        http.send_header("Transfer-Encoding", "chunked")
        http.end_headers()
        for i in range(0, len(body), 65536):
            piece = body[i : i + 65536]
            http.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        http.wfile.write(b"0\r\n\r\n")
        return
    length = 10**9 if fault == "huge" else len(body)
    http.send_response(status)
    for name, value in {**headers, "Content-Length": str(length)}.items():
        http.send_header(name, value)
    http.end_headers()
    if fault == "hang":
        http.wfile.flush()
        time.sleep(1.5)
    elif fault in ("cut", "stall", "no-range", "changed"):
        http.wfile.write(body[: max(len(body) // 2, 1)])
        http.wfile.flush()
        if fault == "stall":
            time.sleep(1.5)
        http.close_connection = True
        http.connection.shutdown(2)
    elif fault == "slow":
        for i in range(0, len(body), 16384):
            http.wfile.write(body[i : i + 16384])
            time.sleep(0.05)
    else:
        http.wfile.write(body)


def _handler(fake: FakeCivitai, answer: Callable[[BaseHTTPRequestHandler], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.seen.append(Seen(self.server.server_address[0], self.path, dict(self.headers)))
            try:
                answer(self)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _json(http: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    _send(http, status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def _send(http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    http.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(body)
