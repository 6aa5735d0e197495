"""A file in a form, onto the disk as it comes in: for uploads too large for memory.

api.loras uses it; pictures are small and go through api.reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FileError, FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from core.loras.download import UPLOADS
from core.loras.registry import cannot_write
from core.problems import cancelled, invalid_field, problem

PART_BYTES = 64 * 1024


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
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            inside = stack.enter_context(tempfile.TemporaryDirectory(prefix=UPLOADS, dir=folder))
        except OSError as error:
            raise cannot_write(folder, error) from error
        form = _Form(inside, options.get(b"boundary"))
        stack.callback(form.close)
        try:
            async for chunk in request.stream():
                await asyncio.to_thread(form.write, chunk)
            await asyncio.to_thread(form.finish)
        except ClientDisconnect:
            raise cancelled() from None
        except FileError as error:
            raise cannot_write(folder, OSError(None, str(error))) from None
        except FormParserError as error:
            raise problem(400, "bad-form", "Malformed form", f"The form cannot be read: {str(error)[:200]}.") from None
        except OSError as error:
            raise cannot_write(folder / "the upload", error) from error
        yield form.fields, form.path()


class _Form:
    """The parts as they come in."""

    def __init__(self, folder: str, boundary: bytes | None) -> None:
        self.fields: dict[str, Any] = {}
        self.files: list[File] = []
        if not boundary:
            raise problem(400, "bad-form", "Malformed form", "The form has no boundary.")
        config = {"UPLOAD_DIR": folder, "UPLOAD_DELETE_TMP": False, "MAX_MEMORY_FILE_SIZE": 0, "MAX_FIELDS": 30, "MAX_FIELD_SIZE": PART_BYTES}
        self._parser = FormParser("multipart/form-data", self._field, self.files.append, boundary=boundary, config=config)

    def write(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> None:
        self._parser.finalize()
        for file in self.files:
            file.file_object.flush()

    def path(self) -> Path:
        if [f.field_name for f in self.files] != [b"file"]:
            raise invalid_field("file", "must be there, once, and be the only file", "a multipart file part named file")
        if self.files[0].actual_file_name is None:
            raise invalid_field("file", "is empty", "a .safetensors file")
        return Path(self.files[0].actual_file_name.decode())

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()

    def _field(self, field: Field) -> None:
        name, value = (field.field_name or b"").decode("utf-8", "replace"), (field.value or b"").decode("utf-8", "replace")
        if name == "file":
            raise invalid_field("file", "must be a file, not text", "a multipart file part", value)
        if name in self.fields:
            raise invalid_field(name[:80], "is given more than once", "once")
        self.fields[name] = value
