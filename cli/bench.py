"""How fast a running server is: so many requests, so many of them at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from cli.server import Refused, checked, unreachable


def run(url: str, key: dict[str, str], values: dict[str, Any], requests: int, clients: int, told: Callable[[], None]) -> dict[str, Any]:
    """Send POST /post_config that many times, each with a seed of its own, since a server computes equal ones once.

    Args:
        key: the headers that show it.
        values: the request's fields; `seed` is that of the first.
        told: called after each.

    Returns:
        pictures, seconds, pictures_per_s, p50_s and p95_s of the answers' latencies, and the refusals by what was said.

    Raises:
        Refused: where the first request, which loads the model and is not counted, fails.
    """
    return asyncio.run(_run(url, key, values, requests, clients, told))


async def _run(url: str, key: dict[str, str], values: dict[str, Any], requests: int, clients: int, told: Callable[[], None]) -> dict[str, Any]:
    first, seeds = int(values.get("seed") or 0), iter(range(1, requests + 1))
    latencies: list[float] = []
    refused: Counter[str] = Counter()
    pictures = 0

    async with httpx.AsyncClient(base_url=url, headers=key, timeout=httpx.Timeout(None, connect=10), limits=httpx.Limits(max_connections=clients)) as http:

        async def draw(seed: int) -> int:
            answer = checked(await http.post("/post_config", data={**values, "seed": seed}))
            return len(answer.headers.get("x-easel-seeds", "0").split(","))

        async def client() -> None:
            nonlocal pictures
            for number in seeds:
                begun = time.perf_counter()
                try:
                    made = await draw(first + number)
                    pictures += made
                    latencies.append(time.perf_counter() - begun)
                except (Refused, httpx.TransportError) as error:
                    refused[str(error) or type(error).__name__] += 1
                told()

        try:
            await draw(first)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise unreachable(url, error) from error
        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    latencies.sort()
    return {
        "pictures": pictures, "seconds": round(seconds, 3), "pictures_per_s": round(pictures / seconds, 3),
        "p50_s": _percentile(latencies, 0.5), "p95_s": _percentile(latencies, 0.95), "refused": dict(refused),
    }  # fmt: skip


def _percentile(latencies: list[float], part: float) -> float | None:
    """The least latency that so many of them do not exceed."""
    return round(latencies[max(0, -int(-part * len(latencies) // 1) - 1)], 4) if latencies else None
