"""Words that no prompt may have, as the operator lists them. core.wording asks for every prompt that is drawn, runners.safety
for every text that is written.

It stops what is written plainly, not who wants to get around it: the pictures themselves are looked at
by runners.safety.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from core.settings import Safety, beside_configuration

# Between words: anything but a letter or digit. An underscore parts words too, as tags are written.
_BEFORE, _AFTER, _BETWEEN = r"(?<![^\W_])", r"(?![^\W_])", r"[\W_]+"


def plain(text: str) -> str:
    """Text as it is compared: compatibility forms (full width, ligatures) as their plain letters, no
    accents, no invisible characters, no case."""
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(c for c in letters if unicodedata.category(c) not in ("Mn", "Cf"))


class Blocklist:
    """Terms: words, or several words in a row. `*` at a term's end stands for any ending."""

    def __init__(self, terms: Iterable[str]) -> None:
        patterns = sorted({pattern for term in terms if (pattern := _pattern(term))})
        self._pattern = re.compile(f"{_BEFORE}(?:{'|'.join(patterns)}){_AFTER}") if patterns else None

    @classmethod
    def configured(cls, settings: Safety) -> Blocklist:
        """`blocklist`, and the lines of `blocklist_file`; those that begin with # are comments.

        Raises:
            OSError, UnicodeDecodeError: where the file cannot be read.
        """
        terms = list(settings.blocklist)
        if settings.blocklist_file:
            lines = Path(beside_configuration(settings.blocklist_file)).read_text(encoding="utf-8").splitlines()
            terms += [line for line in lines if not line.lstrip().startswith("#")]
        return cls(terms)

    def stops(self, prompt: str) -> bool:
        """Whether a prompt has one of the terms."""
        return bool(self._pattern and self._pattern.search(plain(prompt)))


def _pattern(term: str) -> str:
    words = re.findall(r"[^\W_]+", plain(term))
    if not words:
        return ""
    return _BETWEEN.join(map(re.escape, words)) + (r"[^\W_]*" if term.rstrip().endswith("*") else "")
