"""A JSON object in a file that people edit too: where it is wrong, and how to replace it whole.

core.loras.registry is its user.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Broken(Exception):
    """What is wrong with the file, and where."""

    def __init__(self, what: str, text: str, offset: int) -> None:
        before = text[:offset]
        line, column = before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1
        super().__init__(f"line {line}, column {column}: {what}")


def members(text: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The top level's members with where each begins. json.loads alone would let the last of two
    equal names win, and not say where an entry stands."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise Broken(error.msg, text, error.pos) from None
    except RecursionError:
        raise Broken("nested too deeply", text, 0) from None
    except ValueError as error:
        raise Broken(f"cannot be read: {error}", text, 0) from None  # a number of thousands of digits
    if not isinstance(whole, dict):
        raise Broken("must be a JSON object of name to entry", text, 0)
    decode, position = json.JSONDecoder().raw_decode, text.index("{") + 1
    while (start := _skip(text, position)) < len(text) and text[start] != "}":
        name, position = decode(text, start)
        entry, position = decode(text, _skip(text, position))
        if not isinstance(entry, dict):
            raise Broken(f"{name!r} must be a JSON object", text, start)
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Broken(f"{name!r} has half a character (\\uD800 to \\uDFFF)", text, start) from None
        yield name, entry, start


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,:":
        position += 1
    return position


def write(path: Path, text: str) -> None:
    """Replace the file at once and for good: temporary file, fsync, rename, fsync of the folder."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        else:
            os.chmod(temporary, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have a rename in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
