"""Starts Hugging Face's hf-serve as its own command does. On Python 3.11 it needs `reprlib.Repr` to take 3.12's arguments."""

from __future__ import annotations

import reprlib
import sys

if sys.version_info < (3, 12):
    _Repr = reprlib.Repr

    def _with_limits(**limits: int) -> reprlib.Repr:
        made = _Repr()
        vars(made).update(limits)
        return made

    reprlib.Repr = _with_limits  # type: ignore[misc, assignment]

from hf_serve.cli import main

main()
