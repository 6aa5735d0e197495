"""What all of Easel's outgoing connections share: logs without queries, and how Retry-After is read.

core.loras.egress (LoRA downloads), api.webhooks and core.llm (the language model) use it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from email.utils import parsedate_to_datetime

import httpx


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait, from either form of Retry-After; None where there is none that can be read."""
    if not value:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


class _WithoutQuery(logging.Filter):
    """Takes the query off the URLs that httpx logs: signed addresses are as good as keys, and a query may hold a prompt."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(a.copy_with(query=None) if isinstance(a, httpx.URL) else a for a in record.args)
        return True


_WITHOUT_QUERY = _WithoutQuery()


def quiet_logs() -> None:
    """Keep queries and headers out of the HTTP client's logs."""
    logging.getLogger("httpx").addFilter(_WITHOUT_QUERY)  # adding it twice does nothing
    for name in ("httpcore", "httpcore.connection", "httpcore.http11", "httpcore.http2"):
        logging.getLogger(name).setLevel(logging.INFO)  # their debug lines have headers
