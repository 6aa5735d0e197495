"""Clients that do next to nothing, by the thousand, and what others feel of them: `python -m tests.reliability.connections`.

2,000 connections that ask for nothing, and as many again that send a header, or a body, a byte a second, or do not read their answers. Meanwhile pictures are
asked for as before. It exits with 1 where one is not answered, or where the server has not let go of them by the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import USER, Server, serving
from tests.test_shutdown import ONE_MODEL

PATIENCE_S = 5.0
ASK = f"POST /post_config?prompt=x&num_inference_steps=2 HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {USER}\r\n"
LARGE = f"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {USER}\r\n\r\n".encode()
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def opened(server: Server, hello: bytes = b"", receive_bytes: int = 0) -> Pair:
    made = socket.socket()
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", int(server.url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=made, limit=2**10)
    writer.write(hello)
    return reader, writer


async def said(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes the connection."""
    text = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(2**16):
            text += more
    return text


async def trickle(pair: Pair, text: bytes) -> bytes:
    """A byte a second, until the server has had enough; what it said."""
    reader, writer = pair
    answer = asyncio.ensure_future(said(reader))
    for byte in text:
        writer.write(bytes([byte]))
        await asyncio.wait([answer], timeout=1)
        if answer.done():
            break
    writer.close()
    return await answer


async def let_go(pair: Pair) -> None:
    """Return once the server has closed a connection."""
    await said(pair[0])
    pair[1].close()


def taken(server: Server) -> int:
    """Connections to the public port that the server's processes have."""
    first, port = psutil.Process(server.process.pid), int(server.url.rpartition(":")[2])
    return sum(c.laddr.port == port for p in [first, *first.children(recursive=True)] for c in p.net_connections("tcp") if c.status != psutil.CONN_LISTEN)


async def pictures(server: Server, count: int) -> list[float]:
    """How long each of some pictures took, one after another, each on a connection of its own."""
    took = []
    for seed in range(count):
        began = time.perf_counter()
        answer = await asyncio.to_thread(server.post, "/post_config", params={"prompt": "x", "num_inference_steps": 2, "width": 64, "height": 64, "seed": seed})
        assert answer.status_code == 200, answer.text
        took.append(time.perf_counter() - began)
    return took


async def run(server: Server, idle: int, slow: int, count: int) -> list[str]:
    """Open them all, draw pictures meanwhile, and wait until the server has closed them; returns what is wrong."""
    await pictures(server, 3)
    before = await pictures(server, count)
    quiet = [await opened(server) for _ in range(idle)]
    unread = [await opened(server, LARGE * 40, 2048) for _ in range(slow)]
    headers = [asyncio.ensure_future(trickle(await opened(server), b"GET / HTTP/1.1\r\nX-Slow: " + b"a" * 3600)) for _ in range(slow)]
    body = (ASK + "Content-Type: application/json\r\nContent-Length: 3600\r\n\r\n").encode()
    bodies = [asyncio.ensure_future(trickle(await opened(server, body), b"{" * 3600)) for _ in range(slow)]
    most = taken(server)
    meanwhile = await pictures(server, count)
    print(f"{most} connections; median of {count} pictures {statistics.median(before):.2f} s before, {statistics.median(meanwhile):.2f} s meanwhile", flush=True)
    faults = []
    end = time.monotonic() + 20 * PATIENCE_S
    while taken(server) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    if left := taken(server):
        faults.append(f"{left} connections are still open")
    for pair in quiet + unread:
        await let_go(pair)
    said = await asyncio.gather(*bodies)
    if wrong := sum(b" 408 " not in answer for answer in said):
        faults.append(f"{wrong} of {slow} slow bodies were not told so: {next(a for a in said if b' 408 ' not in a)[:100]!r}")
    if any(await asyncio.gather(*headers)):
        faults.append("a header that never ended was answered")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--slow", type=int, default=700, help="of each kind")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), ONE_MODEL | {"server": {"patience_s": PATIENCE_S, "least_rate": 2**17}}) as server:
        faults = asyncio.run(run(server, asked.idle, asked.slow, 20))
    print("\n".join(faults) if faults else "within all bounds")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
