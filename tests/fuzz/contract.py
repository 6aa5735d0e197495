"""Contract fuzzing: schemathesis sends what the OpenAPI document allows and what it does not, to the entry and to each
runner alone, and checks every answer against the document. All of its checks are on.

`make fuzz` runs it with CASES examples a route; `python -m tests.fuzz.contract --help` has the rest. It exits with 1 where anything
was found, and prints how many requests were sent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.settings import ROOT
from tests.civitai import KEY, FakeCivitai
from tests.conftest import ADMIN, Server, serving
from tests.llm import FakeLlm

SERVICES = ("ImageGeneration", "StableDiffusion", "UniDiffuser")
# The starters, kept small, so that what can be honoured is drawn at once.
STARTER = {"id": "starter/stable-diffusion", "family": "starter", "max_size": 64, "num_inference_steps": 2}
UPSCALER = {"id": "starter/upscaler", "family": "upscaler"}
UNIDIFFUSER = {"id": "starter/unidiffuser", "family": "unidiffuser", "size": 64, "prompt_tokens": 20, "num_inference_steps": 2}
OVERRIDES: dict[str, dict[str, object]] = {
    "models": {"catalogue": [STARTER, UPSCALER]},
    "unidiffuser": {"catalogue": [UNIDIFFUSER]},
    "limits": {"num_inference_steps": 3, "count_returned": 2, "images": 2, "upscaled_pixels": 128 * 128},
    "queue": {"deadline_s": 60},
}


@contextmanager
def fuzzed(name: str, folder: Path) -> Iterator[Server]:
    """A service to fuzz, with a Civitai and a language model that answer at once."""
    with FakeCivitai() as civitai, FakeLlm() as llm:
        civitai.add(1, "Style 1")
        overrides = OVERRIDES | {"loras": civitai.settings(), "llm": {"url": llm.url, "model": "tiny"}}
        with serving(folder, overrides, f"service:{name}", env={"CIVIT_KEY": KEY, "LLM_API_KEY": "x"}) as server:
            yield server


def run(server: Server, folder: Path, examples: int, seed: int, more: list[str]) -> tuple[int, int]:
    """Whether anything was found (schemathesis' exit status), and how many requests were sent."""
    report = folder / "report.ndjson"
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(ROOT / "tests/fuzz/schemathesis.toml"), "run", f"{server.url}/openapi.json",
        "--header", f"X-API-Key: {ADMIN}", "--max-examples", str(examples), "--seed", str(seed), "--checks", "all", "--continue-on-failure",
        "--request-timeout", "90", "--no-color", "--report", "ndjson", "--report-ndjson-path", str(report), *more,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": str(ROOT)}, check=False)
    return done.returncode, sent(report)


def sent(report: Path) -> int:
    """The requests in schemathesis' report."""
    count = 0
    for line in report.read_text().splitlines():
        event = json.loads(line)
        scenario = event.get("ScenarioFinished")
        if scenario:
            count += len(scenario["recorder"].get("interactions", ()))  # none of a scenario that was skipped
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=100, help="examples of each route, good and bad ones, beside those for coverage")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--service", choices=SERVICES, action="append", help="all three if left out")
    asked, more = parser.parse_known_args()
    found, total = 0, 0
    for name in asked.service or SERVICES:
        with tempfile.TemporaryDirectory() as folder, fuzzed(name, Path(folder)) as server:
            status, requests = run(server, Path(folder), asked.cases, asked.seed, more)
            found |= status
            total += requests
            print(f"{name}: {requests} requests, {'something was found' if status else 'nothing found'}", flush=True)
    print(f"{total} requests in all")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
