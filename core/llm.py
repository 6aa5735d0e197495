"""The language model upstream that helps with prompts: one question, one answer.

api.llm asks it. The operator chose its address, so that a private one is as good as a public one, but
a redirect to any other origin is not followed. What the caller sent beside the text, the key above
all, does not go along.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

import httpx
from pydantic import BaseModel, Field, ValidationError

from core import __version__
from core.outgoing import parse_retry_after, quiet_logs
from core.problems import Problem, invalid_field, problem, unavailable
from core.settings import Llm, Secrets

log = logging.getLogger("easel.llm")
Route = Literal["llm_prompt_assistance", "llm_interface"]
REDIRECTS = 3


@dataclass(frozen=True)
class Answer:
    """What the model said; `truncated`: its length came to an end before its answer did. A legacy
    upstream's answer is `passed`: as it came, of this media type."""

    text: str
    model: str | None = None
    truncated: bool = False
    passed: Literal["text/plain", "application/json"] | None = None


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """The part of an OpenAI-style chat completion that is read here."""

    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None


class Assistant:
    """The upstream by its settings. At most `concurrent_requests` are asked at once. `log_words`: what it says of an error may be logged."""

    def __init__(self, settings: Llm, secrets: Secrets, log_words: bool = False) -> None:
        self._log_words = log_words
        self.settings, self._key = settings, secrets.llm_api_key.get_secret_value().strip()
        self._asking = 0

    async def ask(self, route: Route, text: str) -> Answer:
        """One question.

        Args:
            route: llm_prompt_assistance sends `system_prompt` along, llm_interface the text alone.
            text: what the caller wrote.

        Raises:
            Problem: 422 where the text is too long; 429 where too many are asked; 502 for an answer that
                is none, 503 where there is no upstream or it is busy, 504 where it takes too long.
        """
        s = self.settings
        if s.url is None:
            raise unavailable("No language model is configured: set llm.url in configuration.yaml.", slug="llm-off")
        if len(text) > s.text_characters:
            raise invalid_field("text", "is too long", f"at most {s.text_characters} characters", f"{len(text)} characters")
        if self._asking >= s.concurrent_requests:
            raise problem(429, "llm-busy", "Too many requests", f"{self._asking} questions are being answered. Try again later.", retry_after=5)
        self._asking += 1
        try:
            async with asyncio.timeout(s.timeout_s), self._client() as client:
                return self._read(*await self._send(client, self._request(client, route, text)))
        except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout):
            raise problem(504, "llm-timeout", "Language model timed out", f"The language model did not answer within {s.timeout_s:g} s.") from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise unavailable("The language model cannot be reached.", retry_after=30, slug="llm-unreachable") from None
        except httpx.HTTPError as error:
            raise _bad(f"an answer that cannot be read ({type(error).__name__})") from None
        finally:
            self._asking -= 1

    def _client(self) -> httpx.AsyncClient:
        """No proxy or netrc from the environment: they would see the key."""
        quiet_logs()
        s = self.settings
        headers = {"User-Agent": f"Easel/{__version__}", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(s.timeout_s, connect=s.connect_timeout_s), trust_env=False)

    def _request(self, client: httpx.AsyncClient, route: Route, text: str) -> httpx.Request:
        s, base = self.settings, str(self.settings.url).rstrip("/")
        if s.kind == "legacy":
            return client.build_request("GET", f"{base}/{route}", params={"text": text})
        messages = [{"role": "user", "content": text}]
        if route == "llm_prompt_assistance" and s.system_prompt:
            messages.insert(0, {"role": "system", "content": s.system_prompt})
        body = {"model": s.model, "messages": messages} | ({"max_tokens": s.max_tokens} if s.max_tokens else {})
        return client.build_request("POST", f"{base}/chat/completions", json=body)

    async def _send(self, client: httpx.AsyncClient, request: httpx.Request) -> tuple[httpx.Response, bytes]:
        """The answer and its body, redirects within the upstream's own origin followed."""
        home = _origin(request.url)
        for _ in range(REDIRECTS + 1):
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                if response.next_request is None:
                    return response, await self._body(response)
            finally:
                await response.aclose()
            request = response.next_request
            if _origin(request.url) != home:
                raise _bad("a redirect to another host, which is not followed")
        raise _bad(f"more than {REDIRECTS} redirects")

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > self.settings.answer_bytes:
                raise _bad(f"more than {self.settings.answer_bytes} bytes (llm.answer_bytes)")
        return bytes(body)

    def _read(self, response: httpx.Response, body: bytes) -> Answer:
        if response.status_code != 200:
            raise self._refusal(response, body)
        if self.settings.kind == "legacy":
            kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
            return Answer(_decoded(response, body), passed="application/json" if kind == "application/json" else "text/plain")
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError:
            raise _bad("no chat completion") from None
        choice = completion.choices[0]
        return Answer(choice.message.content.strip(), completion.model, choice.finish_reason == "length")

    def _refusal(self, response: httpx.Response, body: bytes) -> Problem:
        """Another status than 200. What the upstream says of it is for the operator's log, where prompts may be there: it may quote the
        text, and its key."""
        status, said = response.status_code, body[:300].decode(errors="replace")
        said = said.replace(self._key, "KEY") if self._key else said
        log.warning("the language model answered %d: %s", status, said if self._log_words else "(server.log_prompts: true has what it says logged)")
        if status in (408, 429) or status >= 500:
            after = parse_retry_after(response.headers.get("retry-after"))
            return unavailable(f"The language model is busy or fails ({status}). Try again later.", retry_after=min(int(30 if after is None else after) + 1, 3600), slug="llm-busy")
        if status in (401, 403):
            return problem(502, "llm-refused", "Language model refused", f"The language model refuses Easel's access ({status}); the operator should check LLM_API_KEY.")
        return problem(502, "llm-refused", "Language model refused", f"The language model answered {status}; the server's log has what it said, where server.log_prompts is on.")


def _decoded(response: httpx.Response, body: bytes) -> str:
    try:
        return body.decode(response.charset_encoding or "utf-8", "replace")
    except LookupError:
        return body.decode(errors="replace")


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host.lower(), url.port


def _bad(what: str) -> Problem:
    return problem(502, "llm-answer", "Unexpected answer", f"The language model sent {what}.")
