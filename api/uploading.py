"""A file in a form, onto the disk as it comes in: for uploads too large for memory.

api.loras uses it; pictures are small and go through api.reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from core.loras.download import UPLOAD
from core.loras.registry import cannot_write
from core.problems import Problem, cancelled, invalid_field, problem

FIELD_BYTES = 64 * 1024
PARTS = 30


@contextlib.asynccontextmanager
async def received(request: Request, folder: Path) -> AsyncIterator[tuple[dict[str, Any], Path]]:
    """The form's text fields, and the part `file` as a file inside `folder`, gone afterwards unless
    it was moved. Its name is ours; the sender's is not looked at.

    Raises:
        Problem: 400 for a form that cannot be read, 415, 422 for wrong parts, 507 or 503 where it
            cannot be written.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise problem(415, "unsupported-media-type", "Unsupported media type", "A LoRA is uploaded as multipart/form-data, with the part `file`.")
    if not options.get(b"boundary"):
        raise _malformed("it has no boundary")
    path: Path | None = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("wb", prefix=UPLOAD, suffix=".part", dir=folder, delete=False) as file:
                path = Path(file.name)
                form = _Form(file, options[b"boundary"])
                async for chunk in request.stream():
                    await asyncio.to_thread(form.write, chunk)
                form.finish()
        except ClientDisconnect:
            raise cancelled() from None
        except FormParserError as error:
            raise _malformed(str(error)[:200]) from None
        except OSError as error:
            raise cannot_write(folder / "the upload", error) from error
        yield form.fields, path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


class _Form:
    """The parts as they come in: text into `fields`, the part `file` into the file."""

    def __init__(self, file: IO[bytes], boundary: bytes) -> None:
        self.fields: dict[str, Any] = {}
        self._file, self._files, self._parts, self._ended = file, 0, 0, False
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._text = "", bytearray()
        self._in_file = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> None:
        """Raises:
        Problem: where the form ends early, or has no file.
        """
        self._parser.finalize()
        if not self._ended:
            raise _malformed("it ends before its last boundary")
        if not self._files:
            raise invalid_field("file", "is missing", "a multipart file part named file")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS:
            raise _malformed(f"it has more than {PARTS} parts")
        self._disposition, self._text = b"", bytearray()

    def _header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = b"filename" in options
        if self._in_file:
            self._files += 1
        if self._in_file != (self._name == "file"):
            message = "unknown file" if self._in_file else "must be a file, not text"
            raise invalid_field(self._name[:80] or "file", message, "one multipart file part, named file")
        if (self._files > 1 and self._in_file) or self._name in self.fields:
            raise invalid_field(self._name[:80], "is given more than once", "once")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file.write(memoryview(data)[start:end])
        elif len(self._text) + end - start > FIELD_BYTES:
            raise invalid_field(self._name[:80] or "form", "is too long", f"at most {FIELD_BYTES} bytes")
        else:
            self._text.extend(data[start:end])

    def _part_end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True


def _malformed(why: str) -> Problem:
    return problem(400, "bad-form", "Malformed form", f"The form cannot be read: {why}.")
