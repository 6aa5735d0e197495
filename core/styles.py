"""Prompt styles: named pieces of prompt in a CSV file as A1111 writes it (name, prompt, negative_prompt).

The file may be edited by hand while the service runs. core.wording applies styles to requests;
api.models lists them.
"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from core.problems import FieldError, nearest, shown, unavailable

log = logging.getLogger("easel.styles")
_COLUMNS = ("name", "prompt", "negative_prompt")
MAX_BYTES = 4 * 1024 * 1024


class Style(BaseModel):
    """A style. `{prompt}` in a text is where the request's own stands; without it the text comes behind."""

    model_config = ConfigDict(frozen=True)
    name: str
    prompt: str = ""
    negative_prompt: str = ""


class Styles:
    """The styles of the file at `path` (None: none). A broken file is refused: what it had before stays in force."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._read: tuple[object, dict[str, Style], str | None] = (None, {}, None)

    @property
    def warning(self) -> str | None:
        """What is wrong with the file as it is now."""
        self.entries()
        return self._read[2]

    def entries(self) -> dict[str, Style]:
        """Every style by its name, in the file's order; read anew when the file has changed."""
        if self.path is None:
            return {}
        try:
            stat = self.path.stat()
            stamp: object = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except FileNotFoundError:
            return {}
        if stamp != self._read[0]:
            try:
                self._read = (stamp, parse(_text(self.path)), None)
            except (ValueError, OSError) as error:
                warning = f"{self.path.name} is broken: {error}. The styles it had before stay in force."
                log.warning("%s", warning)
                self._read = (stamp, self._read[1], warning)
        return dict(self._read[1])

    def choose(self, names: str, errors: list[FieldError]) -> list[Style]:
        """The styles of a comma list; a name with a comma stands in quotation marks. Unknown ones go to `errors`.

        Raises:
            Problem: 503 where the file is broken and has not been read before.
        """
        known = self.entries()
        if not known and self.warning:
            raise unavailable(self.warning, slug="styles-broken")
        wanted = [name.strip() for row in csv.reader([names.replace("\n", " ")], skipinitialspace=True) for name in row]
        for name in wanted:
            if name not in known:
                message = f"there is no style {name[:80]!r}{nearest(name, known)}" if name else "has an empty name"
                errors.append(FieldError(field="styles", message=message, allowed=list(known), given=shown(names)))
        return [known[name] for name in dict.fromkeys(wanted) if name in known]


def parse(text: str) -> dict[str, Style]:
    """The styles of a file's text. Rows without texts (A1111's dividers) count as styles too.

    Raises:
        ValueError: saying which line is wrong.
    """
    rows = csv.reader(io.StringIO(text), strict=True)
    styles: dict[str, Style] = {}
    try:
        header = [column.strip() for column in next(rows, [])]
        if header[:2] != list(_COLUMNS[:2]) or header[2:] not in ([], [_COLUMNS[2]]):
            raise ValueError(f"line 1: the header must be {','.join(_COLUMNS)}")
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            name = row[0].strip()
            if len(row) > len(header):
                raise ValueError(f"line {rows.line_num}: {name[:80]!r} has {len(row)} columns; a text with commas stands in quotation marks")
            if not name:
                raise ValueError(f"line {rows.line_num}: a style without a name")
            if name in styles:
                raise ValueError(f"line {rows.line_num}: {name[:80]!r} stands there a second time")
            styles[name] = Style(name=name, **dict(zip(_COLUMNS[1:], row[1:], strict=False)))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    return styles


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {error.object[: error.start].count(10) + 1}: not UTF-8 text") from None


def apply(own: str, styles: list[str]) -> str:
    """A prompt with the styles' texts, one after the other: in the place of `{prompt}`, or behind a comma."""
    for text in styles:
        own = text.replace("{prompt}", own) if "{prompt}" in text else ", ".join(part for part in (own, text) if part)
    return own
