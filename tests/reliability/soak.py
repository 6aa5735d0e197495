"""A long run of mixed work against a real server, which must leave it as it was: `make soak`, or
`python -m tests.reliability.soak --minutes 60`.

Work comes in rounds. After each the server is left alone until its models are unloaded for idleness, and what its processes
hold is put down: like with like, at rest. The first rounds are warm-up. It exits with 1 where, at the end,
a process' memory is more than 5 % above that after warm-up, or its open files or threads have grown;
where a process is another than at the beginning; where a request was answered in a way that it should not;
or where one has not exactly one outcome in the server's log, and of pictures in the usage log.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from tests import miniatures
from tests.civitai import KEY, FakeCivitai
from tests.conftest import ADMIN, Server, serving
from tests.llm import FakeLlm
from tests.reliability import mix
from tests.reliability.mix import LEFT, Client
from tests.reliability.watching import Held, Pace, look

IDLE_S, CLIENTS = 8, 3
MEMORY, SLACK = 0.05, 2  # how much more memory, and how many more files or threads, still count as none
MiB = 2**20


def configured(folder: Path, civitai: FakeCivitai, llm: FakeLlm) -> dict:
    motion, sd15 = folder / "motion", folder / "sd15"
    miniatures.motion().save_pretrained(motion)
    miniatures.sd15().save_pretrained(sd15)
    models = [
        {"id": "starter/stable-diffusion", "family": "starter"}, {"id": "starter/upscaler", "family": "upscaler"},
        {"id": "mini/sd15", "family": "sd15", "source": str(sd15)},
    ]  # fmt: skip
    return {
        "server": {"log_format": "json"},
        "models": {"catalogue": models, "idle_timeout_s": IDLE_S, "cpu_threads": 1, "remembered_bytes": 2 * MiB},
        "unidiffuser": {"idle_timeout_s": IDLE_S, "cpu_threads": 1},
        "animation": {"motion_adapters": [{"id": "mini/motion", "source": str(motion)}]},
        "loras": civitai.settings(),
        "llm": {"url": llm.url, "model": "tiny"},
        "links": {"retention_s": 30, "bytes": 4 * MiB},
        "jobs": {"retention_s": 60},
    }


def work(client: Client, server: Server, seconds: float, cores: float) -> None:
    """One round."""
    end, pace = time.monotonic() + seconds, Pace(server.process.pid, cores)
    with ThreadPoolExecutor(CLIENTS) as pool:
        running: set = set()
        while time.monotonic() < end:
            pace.wait()
            while len(running) < CLIENTS:
                running.add(pool.submit(mix.choose(client), client))
            done, running = wait(running, return_when="FIRST_COMPLETED")
            for one in done:
                one.result()
        wait(running)
        for _ in range(CLIENTS):
            pool.submit(client.hang_up)


def rest(server: Server) -> list[Held]:
    """What the processes hold once no model is in memory and connections have been closed."""
    end = time.monotonic() + 10 * IDLE_S
    while True:
        state = server.get("/buffer_status", key=ADMIN).json()
        if "runners" in state and all(r["ready"] and not r["queue"]["running"] and not any(m["state"] == "warm" for m in r["models"]) for r in state["runners"]):
            break
        if time.monotonic() > end:
            raise SystemExit(f"models are not unloaded: {state}")
        time.sleep(1)
    time.sleep(8)  # uvicorn closes idle connections after 5 s
    return look(server.process.pid)


def grown(rests: list[list[Held]], warm_up: int) -> tuple[list[str], list[str]]:
    """A table of what each process held after warm-up and at the end, and what has grown."""
    lines = ["| process | | after warm-up | at the end | |", "| --- | --- | --- | --- | --- |"]
    faults = []
    for first in rests[0]:
        series = [next((h for h in held if h.pid == first.pid), None) for held in rests]
        if None in series:
            faults.append(f"{first.role} ({first.pid}) is gone")
            continue
        for name, unit in (("uss", MiB), ("files", 1), ("threads", 1)):
            values = [getattr(h, name) / unit for h in series]
            before, after = (statistics.median(values[part]) for part in (slice(warm_up, warm_up + 3), slice(-3, None)))
            more = (after - before) / before
            lines.append(f"| {first.role} | {'memory of its own, MiB' if name == 'uss' else name} | {before:.1f} | {after:.1f} | {more:+.1%} |")
            if more > MEMORY if name == "uss" else after > before + SLACK:
                faults.append(f"{first.role}: {name} {before:.1f} -> {after:.1f}")
    return lines, faults


def lost(client: Client, server: Server) -> list[str]:
    """Requests without exactly one outcome in the log, or with another one than the client saw; jobs that did not end; pictures
    that are not in the usage log."""
    answered: dict[str, list[int]] = {}
    for line in server.log.read_text(errors="replace").splitlines():
        if '"message": "answered"' in line:
            event = json.loads(line)
            answered.setdefault(event["request_id"], []).append(event["status"])
    faults = []
    for sent in client.sent:
        outcomes = answered.get(sent.id, [])
        if len(outcomes) != 1 or (sent.status != LEFT and outcomes != [sent.status]):
            faults.append(f"{sent.kind}, {sent.id}: the client saw {sent.status}, the log has {outcomes}")
    ended = Counter(client.jobs.values())
    faults += [f"a job is {status}" for status in ended if status not in ("succeeded", "canceled")]
    drawn = sum(s.pictures and s.status == 200 for s in client.sent) + ended["succeeded"]
    left = sum(s.pictures and s.status == LEFT for s in client.sent) + ended["canceled"]
    counted = server.get("/admin/usage?group_by=", key=ADMIN).json()["usage"][0]["requests"]
    if not drawn <= counted <= drawn + left:
        faults.append(f"{drawn} requests and jobs were done, {left} left or were cancelled, the usage log has {counted}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--round", type=float, default=120, metavar="SECONDS", help="of work between rests")
    parser.add_argument("--cores", type=float, default=0.5, help="what the server may use on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the server's log and the samples")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, FakeCivitai() as civitai, FakeLlm() as llm:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number in (1, 2, 3):
            civitai.add(number, f"Style {number}")
        with serving(folder, configured(folder, civitai, llm), env={"CIVIT_KEY": KEY, "LLM_API_KEY": "x"}) as server:
            client = Client(server.url, random.Random(asked.seed))
            began, rests = time.monotonic(), []
            while (left := began + 60 * asked.minutes - time.monotonic()) > 0:
                work(client, server, min(asked.round, left), asked.cores)
                rests.append(rest(server))
                with (folder / "samples.jsonl").open("a") as out:
                    out.write(json.dumps([vars(h) for h in rests[-1]]) + "\n")
                told = "  ".join(f"{h.role} {h.uss / MiB:.0f} MiB, {h.files} files, {h.threads} threads" for h in rests[-1])
                print(f"{(time.monotonic() - began) / 60:5.1f} min  {len(client.sent)} requests  {len(client.unexpected)} unexpected  {told}", flush=True)
            minutes = (time.monotonic() - began) / 60
            warm_up = min(len(rests) // 6 + 1, len(rests) - 1)
            table, faults = grown(rests, warm_up)
            faults += lost(client, server)
    faults += client.unexpected
    print(f"\n{minutes:.0f} minutes, {len(rests)} rounds of which {warm_up} warm-up, {len(client.sent)} requests, {len(client.jobs)} jobs", *table, sep="\n")
    print("\n" + ", ".join(f"{kind}: {count}" for kind, count in sorted(mix.tally(client).items())))
    print("\n" + ("\n".join(faults[:60]) if faults else "nothing was lost, and nothing has grown"))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
