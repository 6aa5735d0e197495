"""A1111's infotext, the `parameters` of a picture: a prompt, `Negative prompt: ...`, and a line of `key: value` pairs.

core.metadata writes it, core.replay and the A1111 API read it: of this program's pictures, of A1111's, and of those of the many
programs that write as A1111 does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

_NEGATIVE = "Negative prompt:"
_FEWEST = 3  # pairs; a last line of fewer is one of the prompt
# Keys are bounded, and a text is walked once: it may come from anyone, and be long.
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)\s*(?:,|$)')


@dataclass(frozen=True)
class Infotext:
    """What an infotext says; `settings` are as written, but for the quotation marks."""

    prompt: str
    negative_prompt: str
    settings: dict[str, str]


def parse(text: str) -> Infotext:
    """Read an infotext. Whatever the text is, it is one: of a prompt alone, in the end."""
    text = text.rstrip()
    head, _, last = text.rpartition("\n")
    settings = _pairs(last)
    if len(settings) < _FEWEST:
        head, settings = text, {}
    lines = head.split("\n")
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).lstrip().removeprefix(_NEGATIVE)
    return Infotext("\n".join(lines[:start]).strip(), negative.strip(), settings)


def write(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """An infotext; settings that are None are left out.

    `parse` gives the same back where no line of the prompt begins with "Negative prompt:", nothing but the settings' values begins or
    ends with a blank, and there are three settings or more.
    """
    negative = [f"{_NEGATIVE} {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, line(settings)])


def line(settings: Mapping[str, object]) -> str:
    """The line of settings alone."""
    return ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None)


def _quoted(text: str) -> str:
    """A1111's rule: a value with a comma, a colon or a line break is JSON-quoted. So is one that would not be read as it is."""
    plain = not any(c in text for c in ",:\n") and text == text.strip() and not text.startswith('"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text, strict=False)).encode("utf-8", "replace").decode()  # JSON may hold half a character
        except ValueError:
            return text
    return text


def _pairs(text: str) -> dict[str, str]:
    """The pairs of a line; what is between them and is none is passed over."""
    pairs: dict[str, str] = {}
    at = 0
    while 0 <= at < len(text):
        if match := _PAIR.match(text, at):
            pairs[match[1]] = _unquoted(match[2].strip())
            at = match.end()
        else:
            at = text.find(",", at) + 1 or -1
    return pairs
