"""Starts Hugging Face's hf-serve as its own command does. On Python 3.11 it needs `reprlib.Repr` to take 3.12's arguments."""

from __future__ import annotations

import reprlib
import sys


class Repr(reprlib.Repr):
    def __init__(self, **limits: int) -> None:
        super().__init__()
        vars(self).update(limits)


def main() -> None:
    if sys.version_info < (3, 12):
        reprlib.Repr = Repr  # type: ignore[misc]
    from hf_serve.cli import main

    main()


if __name__ == "__main__":
    main()
