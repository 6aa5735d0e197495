"""What stops an earlier Easel from using what a later one has written."""

from __future__ import annotations


class LaterVersion(OSError):
    """A file or a database is of a version that this Easel does not know."""
